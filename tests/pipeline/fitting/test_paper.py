"""Plans for machines that are not at hand."""

from __future__ import annotations

import pytest

from auto_round.config import build_options
from auto_round.errors import AutoRoundError, ConfigError
from auto_round.pipeline.dry_run import dry_run
from auto_round.pipeline.fitting.accelerators import ACCELERATORS, read_machines
from pipeline.runs import ROWS, SHORT, quantize


def planned(model, devices, **given):
    named = {"model": str(model), "output_dir": "out", "device_map": devices, "seqlen": 64, **given}
    return dry_run(build_options({**SHORT, **named}), dataset=ROWS)


@pytest.mark.parametrize("text", ["0,1", "cuda:0", "auto", "x8", "8xcuda:0", {"a": "cpu"}])
def test_devices_are_no_machines(text):
    assert read_machines(text) is None


@pytest.mark.parametrize("text", ["8xH900", "0xH100", "2xTPU"])
def test_machines_that_are_not_known_are_refused(text):
    with pytest.raises(ConfigError, match="devices"):
        read_machines(text)


@pytest.mark.parametrize(("text", "count", "inside", "nodes"), [("1xh100", 1, 1, 1), ("64 x H200", 64, 8, 8)])
def test_machines(text, count, inside, nodes):
    found = read_machines(text)
    assert (found.count, found.inside, found.nodes) == (count, inside, nodes)


def test_a_block_that_fits_is_divided_by_rows(tiny):
    one, many = (
        planned(tiny("llama"), devices, batch_size=8, iters=200).paper for devices in ("1xH100", "8xH100")
    )
    assert (one.ranks, many.ranks, many.spread) == (1, 8, 1)
    assert one.fits
    assert one.exchanged == 0 < many.exchanged
    assert one.plan.device_bytes == many.plan.device_bytes


def test_a_block_that_does_not_fit_is_spread(tiny, monkeypatch):
    small = ACCELERATORS["H100"].__class__(13e6, 1e15, 3e12, 4e11, "made up")
    monkeypatch.setattr(
        "auto_round.pipeline.fitting.accelerators.ACCELERATORS", {**ACCELERATORS, "H100": small}
    )
    dry = planned(tiny("llama", hidden_size=256, intermediate_size=512), "4xH100", iters=200)
    assert (dry.paper.ranks, dry.paper.spread) == (1, 4)
    assert dry.paper.largest_other > 0
    for part in ("4 x H100, on paper", "spread over 4", "a block", "read", "assumed", "made up"):
        assert part in dry.text


def test_ranks_spread_what_does_not_fit_one(tiny, monkeypatch):
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    least = planned(model, "1xH100", iters=200, memory="lowest").paper.plan.device_bytes
    small = ACCELERATORS["H100"].__class__(1.04 * least, 1e15, 3e12, 4e11, "made up")
    monkeypatch.setattr(
        "auto_round.pipeline.fitting.accelerators.ACCELERATORS", {**ACCELERATORS, "H100": small}
    )
    many = planned(model, "64xH100", iters=200).paper
    assert many.fits
    assert many.ranks * many.spread == 64
    assert many.spread > 1 < many.ranks
    assert f"{many.ranks} ranks" in many.text


@pytest.mark.parametrize("fits", [True, False])
def test_all_blocks_learn_together_on_one_accelerator(tiny, monkeypatch, fits):
    """As the run does it: several processes, or devices that are named, are refused for it."""
    if not fits:
        small = ACCELERATORS["H100"].__class__(1e6, 1e15, 3e12, 4e11, "made up")
        monkeypatch.setattr(
            "auto_round.pipeline.fitting.accelerators.ACCELERATORS", {**ACCELERATORS, "H100": small}
        )
    given = {"iters": 4, "distill_steps": 3, "distill_nsamples": 3}
    one, many = (planned(tiny("llama"), devices, **given) for devices in ("1xH100", "8xH100"))
    assert (many.paper.ranks, many.paper.spread, many.paper.exchanged) == (1, 1, 0)
    assert many.paper.seconds == one.paper.seconds
    assert many.paper.plan.device_bytes == one.paper.plan.device_bytes
    assert many.paper.fits is fits
    assert "8 x H100, on paper: one process on one accelerator" in many.text
    assert "7 idle" in many.text
    assert "idle" not in one.text


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_configuration_is_enough(tiny, tmp_path, family):
    """The same plan as with weights; a run without them is refused before work."""
    model = tiny(family)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((model / "config.json").read_bytes())
    with_weights, without = (planned(path, "8xH100").paper for path in (model, alone))
    assert without.plan.device_bytes == with_weights.plan.device_bytes
    assert (without.read, without.written) == (with_weights.read, with_weights.written)
    with pytest.raises(AutoRoundError, match="safetensors"):
        quantize(alone, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_machines_are_for_dry_runs(tiny):
    with pytest.raises(ConfigError, match="unknown device"):
        quantize(tiny("llama"), "out", device_map="8xH100")


def test_smoothing_holds_a_block_in_float32(tiny):
    """On an accelerator, where other blocks run in bfloat16."""
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    smoothed, as_it_is = (
        {stage.name: stage for stage in planned(model, "1xH100", iters=200, smooth=smooth).paper.plan.stages}
        for smooth in (None, 0)
    )
    assert as_it_is.keys() == smoothed.keys() - {"smooth"}
    weights = smoothed["smooth"].device["weights"]
    assert weights == 4 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
