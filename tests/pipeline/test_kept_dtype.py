"""Folders in another dtype than the model's: layers are in it too, and the plan counts them so."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.log import logger
from auto_round.pipeline.deciding.plan_table import plan_size
from auto_round.pipeline.dry_run import dry_run
from auto_round.pipeline.quantize import run
from export.gguf.small_models import byte_level_tokenizer
from pipeline.runs import ROWS, SHORT, kl_of, quantize, weights

PLAIN = {"iters": 0, "dataset": None, "disable_opt_rtn": True}
LLMC = {"format": "llm_compressor", **PLAIN}
SEARCHED = {"format": "llm_compressor", "iters": 0}


def planned(model, out, **given):
    options = build_options({**SHORT, "model": str(model), "output_dir": str(out), **given})
    return dry_run(options)


def dtypes_of(folder, part):
    return {tensor.dtype for name, tensor in weights(folder).items() if name.endswith(part)}


@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "tuned"])
def test_scales_of_compressed_tensors_are_in_the_dtype_that_loaders_use(tiny, tmp_path, tuned):
    pytest.importorskip("compressed_tensors")
    given = {"format": "llm_compressor", "bits": 8, **({"iters": 1} if tuned else {"iters": 0})}
    result = quantize(tiny("llama", dtype=torch.float16), tmp_path / "out", model_dtype="bfloat16", **given)
    assert dtypes_of(result.folders[0], "_proj.weight_scale") == {torch.bfloat16}
    assert kl_of(result)["llm_compressor"] < 1e-9


def test_scales_that_loaders_would_round_again_are_refused(tiny, tmp_path):
    model = tiny("llama", dtype=torch.float16)
    given = {"model_dtype": "bfloat16", "bits": 8, "scale_dtype": "float16", **LLMC}
    with pytest.raises(UnsupportedError, match="use --scale_dtype bfloat16"):
        quantize(model, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_float32_folder_of_compressed_tensors(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    result = quantize(tiny("llama"), tmp_path / "out", model_dtype="float32", bits=2, **SEARCHED)
    assert dtypes_of(result.folders[0], "_proj.weight_scale") == {torch.float32}
    assert kl_of(result)["llm_compressor"] < 1e-9


def test_formats_of_bfloat16_alone_take_a_model_that_is_stored_in_it(tiny, tmp_path):
    model = tiny("llama", dtype=torch.float16)
    given = {"scheme": "MXFP4", "act_bits": 16, **LLMC}
    quantize(model, tmp_path / "out", model_dtype="bfloat16", **given)
    with pytest.raises(UnsupportedError, match=r"unpacks .* to bfloat16"):
        quantize(tiny("llama"), tmp_path / "wide", model_dtype="float32", **given)


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
@pytest.mark.parametrize(
    "given", [{"model_dtype": "float16"}, {"model_dtype": "bfloat16", "amp": False}], ids=["16", "32"]
)
def test_blocks_see_the_weights_that_the_folder_keeps(tiny, tmp_path, given, live):
    """They saw float32 rounded to the dtype in which they compute, the folder float32 rounded to its own."""
    folder = tiny("llama", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if live else None
    result = quantize(folder, tmp_path / "out", live=model, iters=1, **given)
    assert kl_of(result)["auto_round"] < 1e-9


@pytest.mark.parametrize("family", ["llama", "granitemoe"])
def test_rounded_weights_are_in_the_dtype_of_the_folder(tiny, tmp_path, family):
    """They lay in bfloat16 there: 8 bits of them, in a folder of 24."""
    given = {"format": "fake,auto_round", "scale_dtype": "float32", "iters": 0}
    result = quantize(tiny(family), tmp_path / "out", model_dtype="float32", **given)
    stored = weights(result.folders[0])
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(stored[name], stored[name].bfloat16().float())
    assert kl_of(result)["fake"] < 1e-9


@pytest.mark.parametrize(
    "given",
    [
        {"format": "llm_compressor", "bits": 8},
        {"format": "llm_compressor", "bits": 8, "static_kv_dtype": "fp8", "iters": 1},
        {"format": "fake"},
        {"format": "auto_round,fake", "quant_lm_head": True},
        {"format": "auto_gptq"},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "granitemoe"])
def test_planned_bytes_are_those_written(tiny, tmp_path, family, given):
    pytest.importorskip("compressed_tensors")
    model = tiny(family)
    asked = {**PLAIN, "model_dtype": "float32", "ignore_layers": "layers.1", **given}
    if asked["iters"]:
        del asked["dataset"]
    dry = planned(model, tmp_path / "out", **{k: v for k, v in asked.items() if k != "dataset"})
    result = quantize(model, tmp_path / "out", verify=False, **asked)
    for folder, name in zip(result.folders, dry.job.exporters, strict=True):
        stored = weights(folder)
        size = plan_size(dry.job, dry.job.exporters[name])
        assert size.total_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert size.source_bytes == sum(tensor.nbytes for tensor in weights(model).values())
        assert size.kept_bytes == 4 * size.kept_weights > 0
        (line, *_) = [line for line in result.report["plan"] if line["scheme"] == "16 bits"]
        assert line["bits"] == line["stored_bits"] == 32


def test_a_model_in_memory(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = tiny("llama", dtype=torch.float16)
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    given = {"model_dtype": "bfloat16", "bits": 8, "verify": False, **LLMC}
    mine = quantize(folder, tmp_path / "mine", live=live, **given)
    theirs = quantize(folder, tmp_path / "theirs", **given)
    one, other = (weights(result.folders[0]) for result in (mine, theirs))
    assert one.keys() == other.keys()
    assert all(one[name].dtype is other[name].dtype and torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16, torch.int32, torch.int64}


def test_what_flows_in_has_a_scale_in_the_dtype_of_the_folder(tiny, tmp_path):
    pytest.importorskip("compressed_tensors")
    given = {"scheme": "FP8_STATIC", "group_size": None, "format": "llm_compressor", "iters": 1}
    model = tiny("llama", dtype=torch.float16)
    result = quantize(model, tmp_path / "out", model_dtype="bfloat16", **given)
    assert dtypes_of(result.folders[0], "_proj.input_scale") == {torch.bfloat16}
    assert dtypes_of(result.folders[0], "_proj.weight_scale") == {torch.bfloat16}


def test_tensors_of_a_dtype_of_their_own_keep_it(tiny, tmp_path):
    """Routers in float32 are so on purpose."""
    folder = tiny("llama")
    live = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    live.model.layers[0].mlp.up_proj.float()
    given = {"model_dtype": "float16", "format": "fake", "verify": False, **PLAIN}
    stored = weights(quantize(folder, tmp_path / "out", live=live, **given).folders[0])
    wide = {name for name, tensor in stored.items() if tensor.dtype is torch.float32}
    assert wide == {"model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("given", "tied"),
    [
        ({"iters": 0, "disable_opt_rtn": True, "dataset": None}, True),
        ({"iters": 0}, False),
        ({"iters": 1}, True),
    ],
    ids=["plain", "searched", "tuned"],
)
def test_gguf_weights_are_rounded_from_the_dtype_that_is_asked_for(tiny, tmp_path, caplog, given, tied):
    """The embedding was not, and the plan said that the option has no effect."""
    pytest.importorskip("gguf")
    wide = tiny("llama", dtype=torch.float32, vocab_size=288, tie_word_embeddings=tied)
    narrow = tmp_path / "narrow"
    AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).save_pretrained(narrow)
    found = []
    with caplog.at_level("WARNING", logger=logger.name), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "propagate", True)
        for model, wanted in ((narrow, {}), (wide, {"model_dtype": "bf16"}), (wide, {})):
            caplog.clear()
            out = tmp_path / str(len(found))
            asked = {**SHORT, "model": str(model), "output_dir": str(out), "format": "gguf:q8_0", **given}
            asked = {name: value for name, value in asked.items() if name not in ("group_size", "dataset")}
            data = given.get("dataset", ROWS)
            run(build_options({**asked, **wanted}), tokenizer=byte_level_tokenizer(), dataset=data)
            assert any("rounded from bf16" in said for said in caplog.messages) == bool(wanted)
            assert not any("model_dtype has no effect" in said for said in caplog.messages)
            found.append(_quantized_tensors(out))
    own, cast, uncast = found
    assert cast.keys() == own.keys() > {"token_embd.weight"}
    assert cast == own
    assert all(uncast[name] != own[name] for name in own)


def _quantized_tensors(folder):
    """Name -> bytes of the tensors that are rounded."""
    gguf = pytest.importorskip("gguf")
    (file,) = folder.rglob("*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    return {t.name: t.data.tobytes() for t in tensors if t.tensor_type == gguf.GGMLQuantizationType.Q8_0}


def test_what_a_model_computes_in_float32_stays_in_float32(tiny, tmp_path):
    """DeepSeek's corrections of expert scores: loaders read them in float32 whatever the rest is in."""
    result = quantize(
        tiny("deepseek_v3", dtype=torch.float32), tmp_path / "out", model_dtype="bfloat16", **PLAIN
    )
    stored = weights(result.folders[0])
    corrections = [t for name, t in stored.items() if name.endswith("e_score_correction_bias")]
    assert corrections
    assert {tensor.dtype for tensor in corrections} == {torch.float32}
    assert stored["model.norm.weight"].dtype == torch.bfloat16
