"""Interrupted runs: continued byte for byte, or refused with the difference named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from auto_round.errors import CheckpointError, ConfigError
from auto_round.testing.tiny_models import tiny_config, tiny_model
from pipeline.runs import SHORT, SIZES, Stop, quantize, stop_after, token_rows, tree

HEADS = {"head_dim": 16}
DRIVER = Path(__file__).with_name("crash_driver.py")


@pytest.fixture
def interrupted(tiny, tmp_path):
    """An output folder whose run was stopped after the first of two blocks."""
    with pytest.raises(Stop):
        quantize(tiny("qwen3", **HEADS), tmp_path / "out", progress=stop_after(1))
    assert not (tmp_path / "out").exists()
    return tmp_path / "out"


@pytest.mark.parametrize(
    "given",
    [
        {"format": "auto_round,fake", "enable_norm_bias_tuning": True, "max_shard_size": "64KB"},
        {"iters": 0, "quant_lm_head": True},
        {"iters": 0, "disable_opt_rtn": True, "dataset": None},
    ],
    ids=["tuned", "searched", "plain"],
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_continued_run_gives_the_same_bytes_without_doing_work_twice(tiny, tmp_path, given, blocks):
    model = tiny("qwen3", **HEADS)
    quantize(model, tmp_path / "whole", **given)
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", progress=stop_after(blocks), **given)
    seen = []
    quantize(model, tmp_path / "out", progress=seen.append, **given)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    if given.get("dataset", ()) is not None:
        assert sum(event.stage == "tune" for event in seen) == 2 - blocks


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"iters": 3}, "tune.iters: 2 then, 3 now"),
        ({"batch_size": 4}, "tune.batch_size"),
        ({"bits": 3}, "plan.scheme"),
        ({"ignore_layers": "v_proj"}, "plan.layers quantized"),
        ({"seed": 7}, "calibration.seed: 42 then, 7 now"),
        ({"dataset": token_rows(seed=9)}, "calibration.rows"),
        ({"nsamples": 3}, "calibration.tuned"),
        ({"nblocks": 2}, "nblocks"),
        ({"format": "fake"}, "formats"),
        ({"enable_quanted_input": False}, "enable_quanted_input"),
        ({"max_shard_size": "1MB"}, "max_shard_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_or_data_are_refused(tiny, interrupted, given, named):
    with pytest.raises(ConfigError, match="cannot continue") as caught:
        quantize(tiny("qwen3", **HEADS), interrupted, **given)
    assert named in str(caught.value)
    assert "choose another output folder" in str(caught.value)


def test_another_model_is_refused(tiny, interrupted):
    changed = tiny("qwen3", rope_theta=5e5, **HEADS)
    with pytest.raises(ConfigError, match="model"):
        quantize(changed, interrupted)


def test_the_same_model_with_other_weights_is_refused(tiny, tmp_path):
    model = shutil.copytree(tiny("qwen3", **HEADS), tmp_path / "model")
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", progress=stop_after(1))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"cannot continue(.|\n)*- model: "):
        quantize(model, tmp_path / "out")


def test_a_run_may_begin_anew(tiny, interrupted):
    quantize(tiny("qwen3", **HEADS), interrupted, iters=3, resume=False)
    assert (interrupted / "config.json").exists()


def crash(model, work, rounds, timeout, **given):
    words = [f"{key}={value}" for key, value in given.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(model), str(work), str(rounds), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_and_continued(tiny, tmp_path):
    figures = crash(tiny("qwen3", **HEADS), tmp_path, 3, 300, **SHORT, rows=token_rows(), verify=False)
    assert figures["identical"] == 3
    assert figures["kills"]["inside a shard write"] >= 1


@pytest.mark.slow
def test_killed_at_twenty_moments(tiny, tmp_path):
    given = {**SHORT, "iters": 10, "format": "auto_round,fake", "max_shard_size": "64KB"}
    model = tiny("qwen3", num_hidden_layers=4, **HEADS)
    figures = crash(model, tmp_path, 20, 300, **given, rows=token_rows(), enable_norm_bias_tuning=True)
    assert figures["identical"] == 20
    assert figures["kills"]["inside a shard write"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("spilled", [True, False])
def test_killed_while_all_blocks_learn(tiny, tmp_path, spilled):
    stage = {"distill_steps": 6, "distill_nsamples": 30, "stage": "distill", "spilled": spilled}
    given = {**SHORT, "bits": 2, "not_use_best_mse": False, "verify": False, **stage}
    figures = crash(tiny("qwen3", **HEADS), tmp_path, 8, 600, **given, rows=token_rows(40))
    assert figures["identical"] == 8
    assert set(figures["kills"]) == {"at a random moment", "inside a call", "inside a shard write"}


def test_streams_in_files_change_nothing(tiny, tmp_path, monkeypatch):
    quantize(tiny("qwen3", **HEADS), tmp_path / "whole")
    monkeypatch.setattr("auto_round.pipeline.fitting.choose.STREAMS_SHARE", 0)
    seen = []

    def look(event):
        if event.stage == "calibrate":
            seen.extend(path.name for path in (tmp_path / "out.partial" / "scratch").rglob("*.stream"))
        stop_after(1)(event)

    with pytest.raises(Stop):
        quantize(tiny("qwen3", **HEADS), tmp_path / "out", progress=look)
    assert sorted(seen) == ["quantized-0.stream", "reference-0.stream", "targets-0.stream"]
    quantize(tiny("qwen3", **HEADS), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_model_in_memory_can_be_continued(tmp_path):
    def live(seed=0):
        return tiny_model(tiny_config("llama", **SIZES), dtype=torch.bfloat16, seed=seed)

    quantize("", tmp_path / "whole", live=live())
    with pytest.raises(Stop):
        quantize("", tmp_path / "out", live=live(), progress=stop_after(1))
    with pytest.raises(ConfigError, match="model"):
        quantize("", tmp_path / "out", live=live(seed=1))
    quantize("", tmp_path / "out", live=live())
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_weights_spoilt_between_the_runs_are_found(tiny, interrupted):
    (shard,) = (interrupted.parent / "out.partial" / "output").glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        tensor = file.get_tensor("model.layers.0.mlp.up_proj.qweight")
    data = shard.read_bytes()
    at = data.index(tensor.numpy().tobytes()[:64])
    shard.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.qweight"):
        quantize(tiny("qwen3", **HEADS), interrupted)
    assert not interrupted.exists()
