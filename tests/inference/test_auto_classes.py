"""A folder loads with each class with which Transformers loads its source."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoRoundConfig,
)

from auto_round.inference.disk_names import ConfigNames, DiskNames
from auto_round.inference.qlinear import QuantLinear
from auto_round.models.roles import is_linear
from auto_round.testing.tiny_models import save_tiny_model, tiny_config, tiny_tokenizer
from pipeline.runs import SIZES, quantize
from sweep.configurations import RECURRENT
from sweep.configurations import SIZES as CAUSAL

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

IDS = torch.arange(3, 19).view(2, 8)
TEXT = (AutoModel, AutoModelForCausalLM)
WITH_IMAGES = (*TEXT, AutoModelForImageTextToText)
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")

LANGUAGE = {**CAUSAL, **RECURRENT}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


def saved(model, folder):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_images(folder):
    config = AutoConfig.for_model(
        "qwen3_5", text_config=LANGUAGE, vision_config=VISION, tie_word_embeddings=False
    )
    return saved(AutoModelForImageTextToText.from_config(config), folder)


def without_prefix(folder):
    """As embedding models are saved: no `model.` in the names."""
    config = tiny_config("qwen3", tie_word_embeddings=True, **SIZES)
    return saved(AutoModel.from_config(config), folder)


SOURCES = {
    "causal": (lambda folder: save_tiny_model("llama", folder, **SIZES), TEXT),
    "tied": (lambda folder: save_tiny_model("llama", folder, tie_word_embeddings=True, **SIZES), TEXT),
    "without prefix": (without_prefix, TEXT),
    "renamed experts": (lambda folder: save_tiny_model("mixtral", folder, **SIZES), TEXT),
    "with images": (with_images, WITH_IMAGES),
}
QUICK = (("causal", "auto_round"), ("with images", "auto_round"), ("without prefix", "auto_gptq"))
CASES = [
    pytest.param(source, fmt, marks=() if (source, fmt) in QUICK else pytest.mark.slow)
    for source in SOURCES
    for fmt in FORMATS
]


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize(("source", "fmt"), CASES)
def test_each_class(tmp_path, source, fmt):
    if fmt == "llm_compressor":
        pytest.importorskip("compressed_tensors")
    write, classes = SOURCES[source]
    folder = write(tmp_path / "source")
    quantize(folder, tmp_path / "out", format=fmt, iters=0)
    quantize(folder, tmp_path / "rounded", format="fake", iters=0)
    options = {} if fmt in ("auto_round", "llm_compressor") else {"quantization_config": AutoRoundConfig()}
    for cls in classes:
        model, info = cls.from_pretrained(
            tmp_path / "out", dtype=torch.float32, output_loading_info=True, **options
        )
        assert not info["missing_keys"]
        assert all("lm_head" in name for name in info["unexpected_keys"])
        rounded = cls.from_pretrained(tmp_path / "rounded", dtype=torch.float32)
        assert torch.allclose(outputs(model), outputs(rounded), atol=1e-4)
        if fmt != "llm_compressor":
            layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
            assert len(layers) >= 8


def test_named_layers_in_another_tree(tmp_path):
    """Names and patterns of a causal model speak of the same layers in its base model."""
    folder = save_tiny_model("llama", tmp_path / "source", **SIZES)
    mixed = {"model.layers.0.mlp.down_proj": {"bits": 8}, "layers.1.*o_proj": {"bits": 16}}
    for fmt in ("auto_round", "gptqmodel"):
        quantize(folder, tmp_path / fmt, format=fmt, iters=0, layer_config=mixed)
        model = AutoModel.from_pretrained(
            tmp_path / fmt,
            dtype=torch.float32,
            quantization_config=AutoRoundConfig(),
        )
        assert model.layers[0].mlp.down_proj.fmt.grid.bits == 8
        assert model.layers[1].mlp.down_proj.fmt.grid.bits == 4
        assert type(model.layers[1].self_attn.o_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    "block", ["model.layers", "layers", "model.language_model.layers", "language_model.model.layers"]
)
def test_containers_do_not_count(block):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    names = ConfigNames.of(DiskNames.of(model), [f"{block}.1.mlp.up_proj"], [block])
    known = names.of_layer("model.layers.1.mlp.up_proj")
    assert known[0] == "model.layers.1.mlp.up_proj"
    assert f"{block}.1.mlp.up_proj" in known
    assert f"{block}.0.self_attn.q_proj" in names.of_layer("model.layers.0.self_attn.q_proj")
    assert not any(block in name for name in names.of_layer("lm_head"))


def test_a_list_of_other_blocks_is_not_taken_for_it(tmp_path):
    """A tower beside the language model has blocks of the same name."""
    folder = with_images(tmp_path / "source")
    quantize(folder, tmp_path / "out", iters=0)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not [m for m in model.model.visual.modules() if isinstance(m, QuantLinear)]
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, QuantLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subclasses_of_linear_are_known_while_a_model_is_built(dtype):
    """Falcon's own linear layer, as Transformers makes it: on the meta device, in the dtype of the model."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert is_linear(FalconLinear(64, 32))
    finally:
        torch.set_default_dtype(before)
