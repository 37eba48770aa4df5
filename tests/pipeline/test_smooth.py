"""Channels of inputs are evened out before rounding: the same model, whose inputs round better."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config import build_options
from auto_round.errors import ConfigError
from auto_round.log import ignore_progress, logger
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.deciding.smoothing import refuse_smoothing, strength_of
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.running.smooth import find_changes, with_changes
from auto_round.testing.tiny_models import DENSE, EXPERTS, save_tiny_model
from export.gguf.small_models import byte_level_tokenizer
from pipeline.runs import SHORT, SIZES, Stop, quantize, stop_after, token_rows, tree
from pipeline.uneven import OUTLIERS, save_uneven_model

IDS = torch.tensor(token_rows(3, 16, seed=5))
MX = {"scheme": "MXFP4", "group_size": None, "iters": 0, "disable_opt_rtn": False, "format": "fake"}
MATRICES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return save_uneven_model(tmp_path_factory.mktemp("uneven") / "m")


def job_of(model, **given):
    options = {**SHORT, "model": str(model), "output_dir": "out", "iters": 1, "smooth": 0.5, **given}
    return prepare(build_options(options), dataset=token_rows())


def changes_of(job, scratch):
    return find_changes(job, scratch, ignore_progress, Clock())


def logits_of(source):
    with source.loaded(dtype=torch.float32) as model, torch.no_grad():
        return model(input_ids=IDS).logits


def kl(original, found):
    p, q = original.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_the_rescaled_model_is_the_same_function(tmp_path, family):
    job = job_of(save_tiny_model(family, tmp_path / "m"), group_size=16)
    changes = changes_of(job, tmp_path)
    changed = with_changes(job, changes)
    original = logits_of(job.source)
    assert torch.allclose(
        logits_of(changed.source), original, rtol=1e-3, atol=1e-4 * float(original.abs().max())
    )
    for name, change in changes.items():
        assert not torch.equal(changed.source.read_tensor(name), job.source.read_tensor(name)), name
        assert change.of(job.source.read_tensor(name)).dtype == job.source.tensors[name].dtype


@pytest.mark.parametrize(
    ("family", "rescaled"),
    [
        (
            "llama",
            f"input_layernorm post_attention_layernorm {MATRICES}",
        ),
        (
            "qwen3",
            f"input_layernorm post_attention_layernorm {MATRICES}",
        ),
        (
            "gemma2",
            f"input_layernorm pre_feedforward_layernorm {MATRICES}",
        ),
        ("phi3", "input_layernorm post_attention_layernorm qkv_proj gate_up_proj"),
        ("olmo2", "v_proj o_proj up_proj down_proj"),
        ("mixtral", "input_layernorm q_proj k_proj v_proj o_proj"),
    ],
)
def test_what_is_rescaled(tiny, tmp_path, family, rescaled):
    """Norms behind a layer (OLMo 2) and norms that a router reads (Mixtral) feed nothing that could be."""
    changes = changes_of(job_of(tiny(family), group_size=16), tmp_path)
    found = {name.removesuffix(".weight").rpartition(".")[2] for name in changes if ".layers.0." in name}
    assert found == set(rescaled.split())


def test_only_what_gains_is_rescaled_unless_asked(tiny, tmp_path):
    given = {"scheme": "MXFP4", "group_size": None, "ignore_layers": "down_proj"}
    for smooth, read in ((None, False), (0.5, True)):
        scratch = tmp_path / str(smooth)
        scratch.mkdir()
        changes = changes_of(job_of(tiny("llama", **SIZES), smooth=smooth, **given), scratch)
        assert any("down_proj" in name for name in changes) == read
        assert any("o_proj" in name for name in changes)


def test_nothing_is_claimed_where_no_channel_can_be_rescaled(tiny):
    job = job_of(tiny("llama"), group_size=16)
    assert "smoothing" not in with_changes(job, {}).method.sentence


def test_biases_of_what_makes_a_channel_are_divided_too(tiny, tmp_path):
    changes = changes_of(job_of(tiny("qwen2"), group_size=16), tmp_path)
    bias, weight = (changes[f"model.layers.0.self_attn.v_proj.{part}"] for part in ("bias", "weight"))
    assert torch.equal(bias.divided, weight.divided)
    assert bias.multiplied is None


def test_uneven_inputs_round_better(uneven, tmp_path):
    """Without smoothing one channel in sixteen takes the grid of all others in its group of 32."""
    model = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
    with torch.no_grad():
        original = model(input_ids=IDS).logits
    found = {}
    for smooth in (0, None):
        given = {} if smooth is None else {"smooth": smooth}
        result = quantize(uneven, tmp_path / str(smooth), **{**MX, **given})
        found[smooth] = result.report["held_out"]["kl"]
        said = result.report.get("smoothing")
        assert (said is None) == (smooth == 0)
    assert said["strength"] == 0.5
    assert said["tensors"] == 18
    assert result.report["method"].startswith(
        "large channels of inputs divided (smoothing, strength 0.5), then"
    )
    assert found[None] < 0.6 * found[0]
    tensors = Checkpoint.open(tmp_path / "None")
    written = tensors.read("model.layers.0.input_layernorm.weight")
    before = model.state_dict()["model.layers.0.input_layernorm.weight"]
    assert float(written.max() / written.median()) < 0.5 * float(before.max() / before.median())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "None", dtype=torch.float32)
    with torch.no_grad():
        assert kl(original, plain(input_ids=IDS).logits) < 0.05  # weights of 4 bits, inputs as they are


def test_weights_of_uneven_channels_round_better(uneven, tmp_path):
    """Inputs stay as they are: columns of weights grow with their channels, whatever their own size."""
    found, factors = {}, {}
    for smooth in (0, 0.75):
        given = {**MX, "scheme": "W4A16", "group_size": 32, "smooth": smooth}
        found[smooth] = quantize(uneven, tmp_path / str(smooth), **given).report["held_out"]["kl"]
    assert found[0.75] < 0.6 * found[0]
    for scheme in ("W4A16", "INT4"):
        job = job_of(uneven, scheme=scheme, group_size=None, format="fake", smooth=0.25)
        scratch = tmp_path / scheme
        scratch.mkdir()
        changes = changes_of(job, scratch)
        factors[scheme] = changes["model.layers.0.self_attn.q_proj.weight"].multiplied[3::16].mean()
    assert factors["W4A16"] == pytest.approx(OUTLIERS**0.25, rel=0.2)
    assert factors["INT4"] > 1.5 * factors["W4A16"]  # small columns grow as well


@pytest.mark.parametrize("scheme", ["MXFP8", "FP8_STATIC", "W2A16", "W8A16"])
def test_other_schemes_are_left_as_they_are_unless_asked(tiny, scheme):
    job = job_of(tiny("llama", **SIZES), scheme=scheme, group_size=None, smooth=None)
    assert strength_of(job) == 0.0
    assert strength_of(job_of(tiny("llama", **SIZES), scheme=scheme, group_size=None, smooth=0.3)) == 0.3


@pytest.mark.parametrize(
    ("scheme", "strength"),
    [
        ("MXFP4", 0.5),
        ("MXFP4_RCEIL", 0.5),
        ("INT8", 0.5),
        ("INT4", 0.5),
        ("NVFP4", 0.2),
        ("W4A16", 0.25),
        ("W3A16", 0.25),
    ],
)
def test_what_gains_is_smoothed_unasked(tiny, scheme, strength):
    given = {"scheme": scheme, "group_size": None, "format": "fake"}
    assert strength_of(job_of(tiny("llama", **SIZES), **given, smooth=None)) == strength
    assert strength_of(job_of(tiny("llama", **SIZES), **given, smooth=0)) == 0.0
    plain = {**given, "iters": 0, "disable_opt_rtn": True}
    assert strength_of(job_of(tiny("llama", **SIZES), **plain, smooth=None)) == 0.0


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("mixtral", {"ignore_layers": "self_attn"}),
        ("llama", {"bits": 8, "quant_lm_head": True, "layer_config": {"lm_head": {"bits": 4}}}),
    ],
)
def test_no_rows_are_run_where_nothing_that_gains_could_be_rescaled(tiny, family, given):
    """Experts alone, or the head: the unquantized model would be read once more for nothing."""
    job = job_of(tiny(family, **SIZES), scheme="W4A16", smooth=None, **given)
    assert any(entry.scheme is not None and entry.scheme.bits == 4 for entry in job.plan.entries.values())
    assert strength_of(job) == 0.0


@pytest.mark.parametrize(
    ("own", "kept"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.bfloat16, None)]
)
def test_readers_are_multiplied_by_what_the_norm_as_kept_was_divided_by(tiny, tmp_path, own, kept):
    job = job_of(tiny("gemma2", own), group_size=16, model_dtype=kept)
    changes = changes_of(job, tmp_path)
    norms = {name: change for name, change in changes.items() if "layernorm" in name}
    assert norms
    for name, change in norms.items():
        before = job.source.read_tensor(name)
        stored = change.of(before).to(job.source.kept[name].dtype)
        product = (stored.double() + change.plus) * change.divided.double()
        assert torch.allclose(product, before.double() + change.plus, rtol=1e-5, atol=0)


def test_weights_never_leave_the_range_of_their_dtype(tmp_path):
    """Numbers of float16 end at 65,504: a column that holds 40,000 already is not multiplied by 4."""
    folder = save_tiny_model("llama", tmp_path / "m", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] *= 100
        model.model.layers[0].mlp.down_proj.weight[0, 3] = 4e4
    model.to(torch.float16).save_pretrained(folder)
    job = job_of(folder, group_size=16)
    changes = changes_of(job, tmp_path)
    assert all(change.of(job.source.read_tensor(name)).isfinite().all() for name, change in changes.items())
    assert "model.layers.0.mlp.down_proj.weight" not in changes
    assert "model.layers.1.mlp.down_proj.weight" in changes


@pytest.mark.parametrize("given", [{"sym": True}, {"sym": False}, {"bits": 3}, {"format": "auto_round"}])
def test_weights_that_lie_on_the_grid_already_stay_on_it(tiny, tmp_path, given):
    """Of a model that was trained for it, and lies there in plain numbers: they would be rounded anew."""
    given = {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": False, "format": "fake", **given}
    once = quantize(tiny("llama", intermediate_size=128), tmp_path / "once", smooth=0.25, **given)
    twice = quantize(tmp_path / "once", tmp_path / "twice", **given)
    assert once.report["smoothing"]["tensors"] == 18
    assert twice.report["smoothing"]["tensors"] == 0
    assert twice.report["held_out"]["kl"] < 0.1 * once.report["held_out"]["kl"]
    others = {**given, "group_size": 64}
    assert quantize(tmp_path / "once", tmp_path / "wider", **others).report["smoothing"]["tensors"] == 18


def test_a_killed_run_goes_on_to_the_same_bytes(uneven, tmp_path):
    given = {"scheme": "MXFP4", "group_size": None, "verify": False, "format": "fake", "distill_steps": 4}
    given["distill_nsamples"] = 4
    quantize(uneven, tmp_path / "whole", **given)
    for done, stage in ((1, "smooth"), (1, "tune"), (2, "distill")):
        with pytest.raises(Stop):
            quantize(uneven, tmp_path / stage, progress=stop_after(done, stage), **given)
        seen = []
        quantize(uneven, tmp_path / stage, progress=seen.append, **given)
        assert tree(tmp_path / stage) == tree(tmp_path / "whole")
        assert any(event.stage == "smooth" for event in seen) == (stage == "smooth")


def test_a_model_in_memory_becomes_the_same_folder_and_stays_as_it_is(uneven, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    quantize(uneven, tmp_path / "folder", **{**MX, "verify": False})
    quantize(uneven, tmp_path / "memory", live=live, **{**MX, "verify": False})
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    folder, memory = (Checkpoint.open(tmp_path / name) for name in ("folder", "memory"))
    assert set(folder.names) == set(memory.names)
    assert all(torch.equal(folder.read(name), memory.read(name)) for name in folder.names)


def test_what_cannot_be_rescaled(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    given = {"scheme": "gguf:q8_0", "group_size": None, "format": "gguf:q8_0", "iters": 1, "seqlen": 8}
    folder = tiny("llama", vocab_size=288)
    byte_level_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"smooth 0\.5 is not possible: files of importances"):
        quantize(folder, tmp_path / "asked", **given, smooth=0.5, save_imatrix=str(tmp_path / "i.gguf"))
    with pytest.raises(ConfigError, match="smooth"):
        quantize(folder, tmp_path / "beyond", **{**MX, "smooth": 1.5})


@pytest.mark.parametrize(
    ("scheme", "words"), [("W4A16", "weights are not smoothed: files"), ("MXFP4", "inputs are not smoothed")]
)
def test_a_run_with_importances_says_that_it_does_not_smooth(tiny, caplog, monkeypatch, scheme, words):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger=logger.name)
    job = job_of(tiny("llama", **SIZES), scheme=scheme, group_size=None, smooth=None, format="fake")
    caplog.clear()
    refuse_smoothing(job)
    assert "smoothed" not in caplog.text
    refuse_smoothing(replace(job, importance={"model.layers.0.mlp.up_proj.weight": torch.ones(32)}))
    assert words in caplog.text


def test_plain_rounding_smooths_where_it_is_asked_to(uneven, tmp_path):
    """It takes rows then, and rounds what it has plainly."""
    given = {**MX, "disable_opt_rtn": True}
    before = quantize(uneven, tmp_path / "before", **{**given, "dataset": None})
    after = quantize(uneven, tmp_path / "after", **{**given, "smooth": 0.5})
    assert "smoothing" not in before.report
    assert after.report["smoothing"]["tensors"] == 18
    assert "calibration" in after.report
    assert "calibration" not in before.report
