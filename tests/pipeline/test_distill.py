"""All blocks tuned together: never worse, the same bytes after a kill, one block in memory."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from auto_round.config.memory import MemoryOptions
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.pipeline.distilling import shelf as shelf_module
from auto_round.pipeline.distilling import stage
from auto_round.pipeline.distilling.shelf import CONSTANTS, LEARNED, MOMENTS, Shelf, begin
from auto_round.pipeline.distilling.units import Units
from auto_round.pipeline.fitting import states
from auto_round.pipeline.fitting.level import StreamPlace
from auto_round.testing.tiny_models import save_tiny_model
from auto_round.tuning import distill
from auto_round.tuning.student import CODES, OFFSET
from export.gguf.small_models import save_small_model, sentencepiece_tokenizer
from pipeline.runs import Stop, kl_of, quantize, stop_after, token_rows, tree, weights

DRIVER = Path(__file__).with_name("distill_driver.py")
ROWS = token_rows(40)
SHORT = {"bits": 2, "dataset": ROWS, "distill_steps": 6, "distill_nsamples": 30, "not_use_best_mse": False}
QWEN = {"head_dim": 16}
"""Heads of which keys and values can be packed too."""


def test_held_out_rows_get_closer_and_the_report_says_how_far(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "auto_round")
    events = []
    result = quantize(tiny("qwen3", **QWEN), tmp_path / "out", progress=events.append, **SHORT)
    said = result.report["distillation"]
    assert said["kl_best"] < said["kl_before"]
    assert said["looks"][0] == [0, said["kl_before"]]
    assert min(kl for _, kl in said["looks"]) == said["kl_best"]
    assert (said["steps"], said["rows"], said["tokens"]) == (6, 30, 6 * 30 * 16)
    # the same model, judged by the run as without the stage, and as it is loaded
    assert result.report["held_out"]["kl"] == pytest.approx(said["kl_best"], rel=0.2)
    assert kl_of(result)["auto_round"] < 1e-3
    assert any("KL on held-out rows" in line and "kept step" in line for line in caplog.messages)
    steps = [event for event in events if event.stage == "distill"]
    assert [event.done for event in steps] == list(range(7))
    assert steps[3].seconds_left is not None
    assert steps[-1].loss == pytest.approx(said["looks"][-1][1])
    assert all("distillation" not in block for block in result.report["blocks"])


def test_nothing_changes_where_no_step_is_better(tiny, tmp_path, monkeypatch):
    looks = count(start=1)
    with monkeypatch.context() as worse:
        worse.setattr(stage._Loop, "_divergence", lambda self, flow: float(next(looks)))
        result = quantize(tiny("qwen3", **QWEN), tmp_path / "worse", **{**SHORT, "distill_steps": 2})
    plain = {**SHORT, "distill_steps": 0, "distill_nsamples": None}
    quantize(tiny("qwen3", **QWEN), tmp_path / "without", **plain)
    assert result.report["distillation"]["kept_step"] == 0
    written, before = weights(tmp_path / "worse"), weights(tmp_path / "without")
    assert all(torch.equal(written[name], before[name]) for name in before)


def test_a_loss_that_is_no_number_ends_the_stage_and_not_the_run(tiny, tmp_path, caplog, monkeypatch):
    """At the first step, when nothing was looked at but what block tuning gave."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(stage.Sweep, "step", lambda self, batch, room, number: float("nan"))
    result = quantize(tiny("qwen3", **QWEN), tmp_path / "out", **{**SHORT, "distill_steps": 4})
    said = result.report["distillation"]
    assert (said["kept_step"], len(said["looks"])) == (0, 1)
    assert said["kl_best"] == said["kl_before"]
    assert any("stopped after step 1" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("files", "place", "done", "again"),
    [
        (True, "distill", 4, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (False, "distill", 4, 3),
                (True, "tune", 2, 0),
                (True, "distill", 0, 0),
                (False, "distill", 6, 6),
                (True, "write", 0, None),
            ]
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch, files, place, done, again):
    monkeypatch.setattr(distill, "LOOKS", (0.5, 1.0))
    model, given = tiny("qwen3", **QWEN), {**SHORT, "verify": False}
    quantize(model, tmp_path / "whole", **given)
    if files:
        monkeypatch.setattr(states, "SPILL_BYTES", 0)
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", progress=stop_after(done, place), **given)
    seen = []
    quantize(model, tmp_path / "out", progress=seen.append, **given)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert [e.done for e in seen if e.stage == "distill"][:1] == ([] if again is None else [again])


@pytest.mark.parametrize(("given", "expected"), [({}, 3), ({"memory": "low"}, 1)], ids=["auto", "low"])
def test_units_stay_open_as_far_as_memory_allows(tiny, tmp_path, monkeypatch, given, expected):
    monkeypatch.setattr(states, "SPILL_BYTES", 0)
    opened, most = [], []
    plain = Units.open

    @contextmanager
    def counted(self, number, rows):
        with plain(self, number, rows) as here:
            opened.append(number)
            most.append(len(opened))
            assert not self.shelf._held
            yield here
            opened.remove(number)

    monkeypatch.setattr(Units, "open", counted)
    model, settings = tiny("qwen3", **QWEN, num_hidden_layers=3), {**SHORT, "distill_steps": 2, **given}
    quantize(model, tmp_path / "out", **settings)
    assert max(most) == expected
    assert not opened


def test_all_units_stay_up_to_a_size_and_else_the_last_ones_up_to_another():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for sizes, expected, given, device, streams in (
        ([4, 3, 2, 1], 2, {}, cpu, StreamPlace.HOST),
        ([4, 3, 2, 1], 2, {}, cpu, StreamPlace.FILES),
        ([4, 3, 2, 1], 2, {"low_gpu_mem_usage": True}, cpu, StreamPlace.HOST),
        ([4, 3, 2, 1], 4, {"low_cpu_mem_usage": False}, cpu, StreamPlace.HOST),
        ([4, 3, 2, 1], 0, {"memory": "lowest", "low_cpu_mem_usage": False}, cpu, StreamPlace.FILES),
        ([4, 3, 2, 1], 2, {}, gpu, StreamPlace.DEVICE),
        ([4, 3, 2, 1], 2, {"low_cpu_mem_usage": False}, gpu, StreamPlace.DEVICE),
        ([4, 3, 2, 1], 0, {}, gpu, StreamPlace.HOST),
        ([4, 3, 2, 1], 0, {"low_cpu_mem_usage": False}, gpu, StreamPlace.FILES),
        ([1, 3, 2], 3, {}, cpu, StreamPlace.HOST),
        ([1, 3, 2], 3, {}, gpu, StreamPlace.DEVICE),
        ([1, 3, 2], 0, {"memory": "low"}, cpu, StreamPlace.HOST),
        ([3, 4], 0, {}, cpu, StreamPlace.HOST),
    ):
        units = [size * (states.STAY_BYTES // 6) for size in sizes]
        assert states.SOME_STAY_BYTES == states.STAY_BYTES // 2
        assert states.staying_units(units, MemoryOptions(**given), device, streams) == expected


def test_too_few_rows_are_refused_before_anything_is_tuned(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"expected 4 \+ 2 held out \+ 48 more, and the data give 40"):
        quantize(
            tiny("qwen3", **QWEN), tmp_path / "out", **{**SHORT, "distill_nsamples": None, "distill_steps": 3}
        )
    assert not (tmp_path / "out.partial").exists()


def test_rows_are_seen_again_where_the_data_have_few(tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    few = {**SHORT, "distill_nsamples": None, "distill_steps": 2}
    result = quantize(tiny("qwen3", **QWEN), tmp_path / "out", **few)
    assert any("each of 34 rows 3.8 times; 128 rows would be better" in line for line in caplog.messages)
    said = result.report["distillation"]
    assert (said["rows"], said["tokens"]) == (34, 2 * 34 * 16)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_step_size_that_cannot_be(tiny, tmp_path, value):
    with pytest.raises(ConfigError, match="distill_lr"):
        quantize(tiny("qwen3", **QWEN), tmp_path / "out", **{**SHORT, "distill_lr": value})


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"sym": False, "nblocks": 2, "quant_lm_head": True},
        {"iters": 0, "disable_opt_rtn": True},
        {"distill_scales_only": True, "sym": False},
        {"distill_scales_only": True, "scheme": "NVFP4", "bits": None, "group_size": None, "format": "fake"},
        {"scheme": "MXFP4", "bits": None, "group_size": None, "format": "fake"},
        {"scheme": "NVFP4", "bits": None, "group_size": None, "format": "fake"},
        {"scheme": "FP8_STATIC", "bits": None, "group_size": None, "format": "fake"},
        {"scheme": "INT8", "bits": None, "group_size": None, "format": "fake"},
        {"format": "llm_compressor", "bits": 4, "static_kv_dtype": "fp8"},
        {"amp": False},
    ],
    ids=lambda given: ",".join(map(str, given.values())),
)
def test_number_types(tiny, tmp_path, given):
    result = quantize(tiny("qwen3", **QWEN), tmp_path / "out", **{**SHORT, **given})
    said = result.report["distillation"]
    assert said["kl_best"] <= said["kl_before"]
    assert max(kl_of(result).values()) < 2e-3
    assert result.report["held_out"]["kl"] == pytest.approx(said["kl_best"], rel=0.3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gguf:q4_k_m", "gguf:q2_k_s"])
def test_files_with_a_rounded_embedding_and_head(tmp_path, form):
    model = save_small_model(
        "llama",
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=320,
        tokenizer=sentencepiece_tokenizer(),
    )
    given = {**SHORT, "bits": None, "group_size": None, "format": form, "enable_norm_bias_tuning": True}
    result = quantize(model, tmp_path / "out", **given)
    said = result.report["distillation"]
    assert said["kept_step"] > 0
    assert result.report["held_out"]["kl"] == pytest.approx(said["kl_best"], rel=0.1)
    assert result.report["verified"][form]["reader"] == "gguf"


def shelved(shelf, unit):
    return {name: float(t.sum()) for name, t in shelf.load(unit, LEARNED).items()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_shelf_goes_back_to_the_last_durable_step_and_keeps_the_best(tmp_path, in_memory):
    folder = tmp_path / "shelf"
    for unit in range(2):
        begin(folder, unit, {"v": torch.zeros(3)}, {})

    def put(shelf, step):
        for unit in range(2):
            shelf.put(unit, LEARNED, {"v": torch.full((3,), float(step + unit))}, step)
            shelf.put(unit, MOMENTS, {"m": torch.full((3,), float(step))}, step)

    shelf = Shelf(folder, 2, in_memory=in_memory)
    assert shelved(shelf, 1) == {"v": 0.0}
    for step in (1, 2, 3, 4):
        put(shelf, step)
        if step in (2, 3):
            shelf.make_durable(step, {"best": 2})
    assert shelved(shelf, 1) == {"v": 15.0}
    again = Shelf(folder, 2, in_memory=in_memory)
    assert again.progress == {"best": 2, "step": 3}
    assert shelved(again, 1) == {"v": 12.0}
    assert float(again.load(0, MOMENTS)["m"][0]) == 3.0
    again.take_best()
    assert [shelved(again, unit) for unit in range(2)] == [{"v": 6.0}, {"v": 9.0}]
    put(again, 4)
    again.make_durable(4, {"best": 4})
    kept = {path.name for path in folder.glob("*.safetensors")}
    assert kept == {f"{unit:04d}-{kind}-000004.safetensors" for unit in (0, 1) for kind in (LEARNED, MOMENTS)}


def test_codes_stay_where_only_scales_are_learned(tiny, tmp_path, monkeypatch):
    """Nor are offsets kept for a continued run, four bytes of each weight: codes do, of one byte."""
    kept, save = {}, shelf_module.save_tensors

    def saved(path, tensors, **how):
        kept.update({f"{path.parent.name}/{name}": tensor for name, tensor in tensors.items()})
        save(path, tensors, **how)

    monkeypatch.setattr(shelf_module, "save_tensors", saved)
    model, given = tiny("qwen3", **QWEN), {**SHORT, "distill_scales_only": True, "verify": False}
    result = quantize(model, tmp_path / "scales", **given)
    assert not any(name.partition("/")[2].startswith(OFFSET) for name in kept)
    codes = {name: t for name, t in kept.items() if name.startswith(f"{CONSTANTS}/{CODES}")}
    assert codes
    assert {t.dtype for t in codes.values()} == {torch.uint8}
    assert result.report["distillation"]["kept_step"] > 0
    quantize(model, tmp_path / "without", **{**SHORT, "distill_steps": 0, "distill_nsamples": None})
    written, before = weights(tmp_path / "scales"), weights(tmp_path / "without")
    changed = {name for name in before if not torch.equal(written[name], before[name])}
    assert {name.rpartition(".")[2] for name in changed if "norm" not in name} == {"scales"}
    assert any(name.endswith("norm.weight") for name in changed)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Offsets and moments of a block here are 38 MB, its weights in the dtypes of the run some 20 MB."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    peaks = []
    for blocks in (2, 8):
        folder = tmp_path / f"model-{blocks}"
        save_tiny_model("llama", folder, dtype=torch.bfloat16, **sizes, num_hidden_layers=blocks)
        command = [sys.executable, str(DRIVER), str(folder), str(tmp_path / f"out-{blocks}"), "4"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
    per_block = 12 * (4 * 512 * 512 + 3 * 512 * 1536)
    assert peaks[1] - peaks[0] < per_block
