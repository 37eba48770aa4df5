"""What people do with a model once it is loaded, over folders of three formats as the package writes them."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    AutoTokenizer,
    CompressedTensorsConfig,
    pipeline,
)

from auto_round.errors import UnsupportedError
from auto_round.inference.convert_model import change_backend
from auto_round.inference.qlinear import QuantLinear
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES, quantize

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

OURS = ("auto_round", "auto_gptq")
"""Formats that this package loads; Transformers loads the third with compressed-tensors."""

IDS = torch.arange(3, 19).view(2, 8)
MASK = torch.ones_like(IDS)
PACKED = "model.layers.0.mlp.up_proj"

_GPTQ = pytest.param("auto_gptq", marks=pytest.mark.slow)
each = pytest.mark.parametrize("fmt", ["auto_round", _GPTQ, "llm_compressor"])
ours = pytest.mark.parametrize("fmt", ["auto_round", _GPTQ])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a format, written once."""
    root = tmp_path_factory.mktemp("written")
    source = save_tiny_model("llama", root / "source", **SIZES)

    def written(fmt):
        if fmt == "llm_compressor" and importlib.util.find_spec("compressed_tensors") is None:
            pytest.skip("compressed-tensors is not installed")
        if not (root / fmt).exists():
            quantize(source, root / fmt, format=fmt, iters=0)
        return root / fmt

    return written


@pytest.fixture
def load(folder):
    def loaded(fmt, dtype=torch.float32, *, trained=False, **options):
        if fmt == "auto_gptq":
            options["quantization_config"] = AutoRoundConfig()
        if fmt == "llm_compressor" and trained:
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder(fmt), dtype=dtype, **options)

    return loaded


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def quantized(model):
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def generate(model, ids=IDS, mask=MASK, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)


@each
def test_batches_with_padding_on_the_left(load, fmt):
    model, short = load(fmt), [11, 12, 13]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 0, *short]])
    both = generate(model, ids, (ids != 0).long())
    alone = generate(model, torch.tensor([short]), torch.ones(1, 3, dtype=torch.long))
    assert both[1, 6:].tolist() == alone[0, 3:].tolist()


@each
def test_static_cache_beams_and_lookups(load, fmt):
    model = load(fmt)
    plain = generate(model)
    assert torch.equal(generate(model, cache_implementation="static", disable_compile=True), plain)
    assert generate(model, num_beams=2).shape == plain.shape
    looked_up = generate(model, IDS[:1], MASK[:1], prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up[0], plain[0, : looked_up.shape[1]])


@pytest.mark.slow
@each
@pytest.mark.parametrize("gradients", [False, True])
def test_compiled(load, fmt, gradients):
    model = load(fmt)
    want = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(compiled(IDS).logits, want, atol=1e-4)


@each
def test_pipelines(folder, load, fmt):
    tokenizer = AutoTokenizer.from_pretrained(folder(fmt))
    writer = pipeline("text-generation", model=load(fmt), tokenizer=tokenizer)
    text = writer("abc", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("abc")
    if fmt == "auto_round":  # the others need a package, or a configuration
        other = pipeline("text-generation", model=str(folder(fmt)))
        assert other("abc", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("abc")


@each
def test_copies_and_pickles(load, fmt):
    model = load(fmt)
    copied = copy.deepcopy(model)
    want = logits(model)
    assert torch.equal(logits(copied), want)
    if fmt == "llm_compressor":
        return  # compressed-tensors gives layers functions that cannot be pickled
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    assert torch.equal(logits(torch.load(pickled, weights_only=False)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)


@each
def test_saved_again(load, fmt, tmp_path):
    model = load(fmt)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@each
def test_state_dicts(load, fmt, tmp_path):
    model, other = load(fmt), load(fmt)
    want = logits(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    if fmt in OURS:  # compressed-tensors unpacks in the first call, after which its tensors are others
        with torch.no_grad():
            for tensor in [*other.parameters(), *(b for m in quantized(other) for b in m.buffers())]:
                tensor.zero_()
        found = other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert not found.missing_keys
        assert not found.unexpected_keys
        assert torch.equal(logits(other), want)
    assert model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), want)


@ours
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{PACKED}.qweight"), f"(?s)Missing.*{PACKED}.qweight"),
        (lambda state: state.update({f"{PACKED}.more": torch.zeros(1)}), f"(?s)Unexpected.*{PACKED}.more"),
        (lambda state: state.update({f"{PACKED}.qweight": torch.zeros(3, 3)}), f"(?s){PACKED}: .*qweight is"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_state_dicts_that_do_not_fit(load, fmt, change, message):
    model = load(fmt)
    want, state = logits(model), model.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert torch.equal(logits(model), want)


@each
def test_another_dtype(load, fmt):
    model = load(fmt)
    want, weights = logits(model), [layer.dequantize(torch.float32) for layer in quantized(model)]
    model.to(torch.bfloat16)
    near = logits(model)
    assert near.dtype == torch.bfloat16
    assert (near - want).abs().max() < 0.05 * want.abs().max()
    if fmt in OURS:  # nothing was lost on the way
        with pytest.raises(ValueError, match="half"):  # Transformers' own word for quantized models
            model.half()
        assert logits(model.to(torch.float64)).dtype == torch.float64
        found = [layer.dequantize(torch.float32) for layer in quantized(model)]
        assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))


@each
@pytest.mark.parametrize(
    "options", [{"attn_implementation": "eager"}, {"device_map": "cpu"}, {"device_map": "auto"}]
)
def test_ways_to_load(load, fmt, options):
    assert torch.allclose(logits(load(fmt, **options)), logits(load(fmt)), atol=1e-4)


@each
def test_embeddings_of_another_size(load, fmt, tmp_path):
    model = load(fmt)
    want = logits(model)
    model.resize_token_embeddings(140)
    assert torch.equal(logits(model)[..., :128], want)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@ours
def test_a_plain_model(load, fmt, tmp_path):
    model = load(fmt)
    want = logits(model)
    plain = model.dequantize()
    assert plain is model
    assert type(model.get_submodule(PACKED)) is torch.nn.Linear
    assert torch.equal(logits(model), want)  # the reference kernel multiplies by the same weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again), want)
    assert load(fmt).dequantize(torch.bfloat16).dtype == torch.bfloat16
    changed = load(fmt, torch.bfloat16).to(torch.float32)
    assert logits(changed.dequantize()).dtype == torch.float32


@ours
def test_what_a_weight_answers(load, fmt):
    model = load(fmt, torch.bfloat16)
    layer = model.get_submodule(PACKED)
    weight = layer.weight
    assert isinstance(layer, torch.nn.Linear)
    assert (weight.dtype, weight.device.type, tuple(weight.shape)) == (torch.bfloat16, "cpu", (96, 64))
    dense = layer.restore().weight.format.dequantize(layer.restore().weight, torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(weight.clone(), dense)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, dense))
    assert torch.equal(weight.T[:, :5], dense.T[:, :5])
    assert torch.equal(weight.data.float(), dense.float())
    assert PACKED + ".weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.add_(1),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.copy_(torch.zeros(96, 64)),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: setattr(layer.weight, "data", torch.zeros(96, 64)),
        lambda layer: torch.nn.init.zeros_(layer.weight),
    ],
)
def test_a_weight_is_not_changed_in_silence(load, change):
    layer = load("auto_round").get_submodule(PACKED)
    before = layer.dequantize()
    with pytest.raises(UnsupportedError, match=r"(?s)cannot be changed in place.*dequantize\(\)"):
        change(layer)
    assert torch.equal(layer.dequantize(), before)


@ours
@pytest.mark.parametrize("backend", ["torch", "cpu_int4", "auto"])
def test_gradients_are_those_of_the_dequantized_layer(load, fmt, backend):
    model = load(fmt, torch.bfloat16)
    change_backend(model, backend)
    layer = model.get_submodule(PACKED)
    layer.bias = torch.nn.Parameter(torch.zeros(96, dtype=torch.bfloat16))
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    back = torch.randn_like(y)
    y.backward(back)
    assert torch.equal(x.grad, back @ layer.dequantize())
    assert torch.allclose(layer.bias.grad, back.flatten(0, 1).sum(0))
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def adapters(model, **options):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn(load, fmt, dtype):
    torch.manual_seed(0)
    model = adapters(load(fmt, dtype, trained=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.5), []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(fmt, dtype, trained=True)))


@ours
def test_adapters_are_merged_into_a_plain_model(load, fmt):
    model = adapters(load(fmt), init_lora_weights=False)
    want = logits(model)
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match=r"dequantize\(\) first"):
            model.merge_and_unload(safe_merge=safe)
    model.dequantize()
    merged = model.merge_and_unload()
    assert not quantized(merged)
    assert torch.allclose(logits(merged), want, atol=1e-4)


@ours
def test_adapters_of_other_kinds(load, fmt, tmp_path):
    peft = pytest.importorskip("peft")
    adapters(load(fmt), use_dora=True)(input_ids=IDS, labels=IDS).loss.backward()
    model = peft.prepare_model_for_kbit_training(load(fmt, torch.bfloat16))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    moved = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(moved) == 14  # seven matrices in each of two blocks
    assert all(bool(grad.abs().sum() > 0) for grad in moved)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(fmt, torch.bfloat16), tmp_path)
    assert len([n for n, _ in again.named_parameters() if "lora_B" in n]) == 14


@pytest.mark.slow
@ours
def test_adapters_with_the_trainer(load, fmt, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    trainer = Trainer(adapters(load(fmt)), arguments, train_dataset=rows)
    assert trainer.train().global_step == 2


@each
def test_gradient_checkpoints_and_autocast(load, fmt):
    model = load(fmt)
    model.gradient_checkpointing_enable()
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert bool(model.model.embed_tokens.weight.grad.abs().sum() > 0)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = logits(model)
    want = logits(model)
    assert (near.float() - want).abs().max() < 0.05 * want.abs().max()
