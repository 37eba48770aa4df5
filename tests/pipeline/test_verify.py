"""The closing check: what it takes for an error, what it forgives, and what it does without."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from auto_round.cli import exit_codes
from auto_round.cli import main as cli
from auto_round.config import build_options
from auto_round.errors import CheckpointError, NothingQuantizedError, UnsupportedError
from auto_round.pipeline.checking import reload, verify
from auto_round.pipeline.checking.verify import FLIPPED_SHARE, LARGEST_KL, LARGEST_KL_COARSE, _few_flips
from auto_round.pipeline.deciding.prepare import prepare
from pipeline.runs import quantize, token_rows
from sweep.outcome import save_family

PLAIN = {"iters": 0, "disable_opt_rtn": True, "dataset": None}
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32}


def test_only_few_positions_are_forgiven():
    each = torch.zeros(128)
    each[5] = 2.0
    assert _few_flips(each, LARGEST_KL)
    each[: int(128 * FLIPPED_SHARE) + 1] = 0.5
    assert not _few_flips(each, LARGEST_KL)  # one more than may go astray
    assert not _few_flips(torch.full((128,), 2 * LARGEST_KL), LARGEST_KL)
    each = torch.zeros(128)
    each[7] = 40.0
    assert not _few_flips(each, LARGEST_KL)  # no expert is that wrong
    assert not _few_flips(torch.full((128,), float("nan")), LARGEST_KL)


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({}, LARGEST_KL),
        ({"scheme": "INT8_W8A8"}, LARGEST_KL),
        ({"scheme": "INT8_W8A8", "act_dynamic": False, "act_group_size": 0}, LARGEST_KL_COARSE),
        ({"scheme": "FP8_STATIC"}, LARGEST_KL_COARSE),
        ({"scheme": "INT4"}, LARGEST_KL_COARSE),
    ],
    ids=str,
)
def test_more_is_allowed_where_inputs_are_coarse(tiny, given, limit):
    """One step for all tokens is coarse for most of them, whatever its bits."""
    options = build_options({"model": str(tiny("llama")), "format": "fake", "device_map": "cpu", **given})
    job = prepare(options, dataset=token_rows(8, 16), rows=False)
    assert verify._largest_kl(job) == limit


@pytest.mark.parametrize(("family", "passes"), [("qwen3_moe", True), ("llama", False)])
def test_a_token_that_went_to_another_expert(tiny, tmp_path, monkeypatch, family, passes):
    """One position of 120 predicts something else: a flip of routing, or in a dense model an error."""
    original = verify.batches

    def flipped(*args):
        found = original(*args)
        found[0].tuned[0][3] = found[0].tuned[0][3].roll(1)
        return found

    monkeypatch.setattr(verify, "batches", flipped)
    monkeypatch.setattr(verify, "LARGEST_KL", 1e-4)
    source = tiny(family, **(EXPERTS if family == "qwen3_moe" else {}))
    rows = token_rows(24, 32)
    if passes:
        result = quantize(source, tmp_path / "out", dataset=rows, nsamples=16, seqlen=32)
        assert result.report["verified"]["auto_round"]["kl"] > 1e-4
    else:
        with pytest.raises(CheckpointError, match="does not predict what was tuned"):
            quantize(source, tmp_path / "out", dataset=rows, nsamples=16, seqlen=32)


def test_a_folder_without_data_is_loaded_too(tiny, tmp_path, monkeypatch):
    result = quantize(tiny("llama"), tmp_path / "out", **PLAIN)
    assert result.report["verified"] == {"auto_round": {"tokens": 1}}
    original = reload.Reader.load

    def failing(self, folder):
        model = original(self, folder)
        model.model.norm.weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(reload.Reader, "load", failing)
    with pytest.raises(CheckpointError, match="128 of 128 logits after one token are NaN"):
        quantize(tiny("llama"), tmp_path / "other", **PLAIN)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_does_not_load_is_not_called_done(tiny, tmp_path, monkeypatch):
    def damaged(config, *args):
        return None if config is None else {**config, "bits": 2}

    from auto_round.pipeline.writing import finish

    original = finish.write_configs
    monkeypatch.setattr(
        finish,
        "write_configs",
        lambda folder, source, q, **more: original(folder, source, damaged(q), **more),
    )
    with pytest.raises(CheckpointError):
        quantize(tiny("llama"), tmp_path / "out", **PLAIN)


def test_too_little_memory_is_reported(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(reload, "available_bytes", lambda: 1000)
    result = quantize(tiny("llama"), tmp_path / "a", **PLAIN)
    assert "of memory" in result.report["verified"]["auto_round"]["skipped"]
    monkeypatch.undo()

    def ends(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(reload, "predict_one_token", ends)
    monkeypatch.setattr(verify, "predict_one_token", lambda model, folder: _guarded(folder, ends))
    result = quantize(tiny("llama"), tmp_path / "b", **PLAIN)
    assert "memory ended" in result.report["verified"]["auto_round"]["skipped"]


def _guarded(folder, action):
    with reload._failures(folder):
        action()


def test_a_text_that_cannot_be_made_rejects_nothing(tiny, tmp_path, capsys):
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**settings, "penalty_alpha": 0.6, "top_k": 4}))
    result = quantize(source, tmp_path / "out")
    checked = result.report["verified"]["auto_round"]
    assert checked["kl"] == 0.0
    assert checked["sample"] or checked["no_sample"]
    (source / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": ["x"]}))
    result = quantize(source, tmp_path / "stops")
    assert result.report["verified"]["auto_round"]["sample"]


def test_generation_that_fails_is_said(tiny, tmp_path, monkeypatch, capsys):
    def failing(*args):
        raise ValueError("no such words")

    monkeypatch.setattr(verify, "_generate", failing)
    result = quantize(tiny("llama"), tmp_path / "out")
    assert result.report["verified"]["auto_round"]["no_sample"] == "ValueError: no such words"
    from auto_round.cli.summary import summary

    assert "no sample   ValueError: no such words" in summary(result)


def test_advice_of_plain_rounding_works_with_data_named(tmp_path, tmp_path_factory, caplog):
    """Blocks whose hidden states have tokens of the model's own are not tuned, but rounding runs none."""
    source = save_family("cpmant", tmp_path_factory.mktemp("cpmant"))
    with pytest.raises(UnsupportedError, match="--recipe rtn"):
        quantize(source, tmp_path / "tuned")
    assert not list(tmp_path.iterdir())  # before any work
    result = quantize(source, tmp_path / "out", iters=0, disable_opt_rtn=True)
    assert result.report["verified"] == {"auto_round": {"tokens": 1}}
    assert "without a measurement" in caplog.text


def test_nothing_to_quantize_is_no_success(tiny, tmp_path, capsys):
    source = tiny("llama", hidden_size=24, intermediate_size=40)  # no multiple of 32
    with pytest.raises(NothingQuantizedError, match="no multiple of 32"):
        quantize(source, tmp_path / "out", **{**PLAIN, "group_size": -1})
    words = [str(source), "--recipe", "rtn", "--group_size", "-1", "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == exit_codes.FAILED == 1
    assert "no matrix of this model can be quantized" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_stays_at_16_bits_is_said_with_its_share(tmp_path, caplog):
    result = quantize(save_family("jetmoe", tmp_path / "model"), tmp_path / "out", **PLAIN)
    warning = next(w for w in result.plan.warnings if "does not say how its experts compute" in w)
    assert "% of the model's weights" in warning
    assert warning in caplog.text


@pytest.mark.parametrize("given", [{}, PLAIN])
def test_matrices_stored_the_other_way_round_are_packed(tiny, tmp_path, given):
    source = tiny("gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=64)
    result = quantize(source, tmp_path / "out", format="auto_round,auto_gptq,fake", **given)
    assert len(result.plan.quantized) == 8
    if not given:
        found = {name: figures["kl"] for name, figures in result.report["verified"].items()}
        # GPT-2's own layers multiply by the transposed matrix, and PyTorch may add in another order for it.
        assert found.pop("fake") < 1e-7
        assert found == {"auto_round": 0.0, "auto_gptq": 0.0}
    for other in ("llm_compressor", "auto_awq"):
        with pytest.raises(UnsupportedError, match="Conv1D"):
            quantize(source, tmp_path / other, format=other, **given)
