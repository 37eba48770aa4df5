"""Dry runs: true sizes, nothing written, and what stands in the way is said."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.pipeline.deciding.fit import workload
from auto_round.pipeline.deciding.plan_table import manifests, plan_size
from auto_round.pipeline.distilling.cost import LOOKS_BESIDE, passes
from auto_round.pipeline.distilling.sweep import Sweep
from auto_round.pipeline.distilling.units import OpenUnit
from auto_round.pipeline.dry_run import DryRun, dry_run
from auto_round.pipeline.estimate import Rates, RunEstimate, estimate
from auto_round.pipeline.fitting import states
from auto_round.pipeline.fitting.level import MemoryLevel, StreamPlace
from auto_round.pipeline.fitting.together import Together
from auto_round.pipeline.fitting.work import measure_sizes
from auto_round.tuning.distill import DistillConfig
from auto_round.tuning.student import Student
from auto_round.units import size
from pipeline.runs import ROWS, SHORT, quantize, token_rows, weights

HEADS = {"head_dim": 16}
RATES = Rates(operations=1e9, bandwidth=1e9)


def planned(model, out, **given):
    return dry_run(
        build_options({**SHORT, "model": str(model), "output_dir": str(out), **given}), dataset=ROWS
    )


def expected_of(dry: DryRun, rates: Rates = RATES) -> RunEstimate:
    return estimate(workload(dry.job), dry.memory, rates)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, {"format": "auto_round"}),
        ({}, {"format": "auto_round", "sym": False, "bits": 3}),
        ({"tie_word_embeddings": True}, {"format": "auto_round", "quant_lm_head": True}),
        ({"tie_word_embeddings": True}, {"format": "fake,auto_round"}),
    ],
)
def test_planned_bytes_are_those_written(tiny, tmp_path, changes, given):
    model = tiny("qwen3", **HEADS, **changes)
    dry = planned(model, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())
    result = quantize(model, tmp_path / "out", verify=False, **given)
    for folder, (name, manifest) in zip(result.folders, manifests(dry.job).items(), strict=True):
        stored = weights(folder)
        size = plan_size(dry.job, dry.job.exporters[name])
        assert manifest.nbytes == sum(t.nbytes for t in stored.values())
        assert size.total_bytes == manifest.nbytes
        assert size.source_bytes == sum(t.nbytes for t in weights(model).values())
        quantized = sum(t.nbytes for n, t in stored.items() if n.rpartition(".")[0] in result.plan.quantized)
        count = sum(math.prod(layer.shape) for layer, _ in dry.job.quantized().values())
        assert size.bits_per_weight == pytest.approx(8 * quantized / count)
    assert f"{size.bits_per_weight:.3f} bits per weight" in dry.text or len(dry.job.exporters) > 1
    assert dry.disk.output == sum(m.nbytes for m in manifests(dry.job).values())


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor"])
def test_rows_of_the_plan_agree_with_their_total(tiny, tmp_path, name):
    text = planned(tiny("llama"), tmp_path / "out", format=name, iters=0).text
    rows = [float(bits) for bits in re.findall(r"([\d.]+) bpw", text)]
    (total,) = re.findall(r"weights at ([\d.]+) bits per weight \(codes, steps and zero points\)", text)
    assert min(rows) <= float(total) <= max(rows)


def test_a_folder_of_rounded_weights_has_no_codes(tiny, tmp_path):
    text = planned(tiny("llama"), tmp_path / "out", format="fake").text
    assert "4.500 bpw" in text, "what the scheme would take"
    assert "bits per weight (rounded weights in the source's dtype)" in text


def test_the_text_says_what_matters(tiny, tmp_path):
    text = planned(tiny("llama"), tmp_path / "out").text
    for part in (
        "model.layers.{0-1}.mlp.up_proj",
        "W4 g32 sym",
        "output head",
        "SignRound, 2 steps",
        "cpu, blocks run in bfloat16",
        "memory:  about",
        "64 rows at once, activations in host memory",
        "offsets and ranges",
        "hidden states",
        "disk:",
        "a rough estimate",
        str(tmp_path / "out"),
    ):
        assert part in text
    assert "refused" not in text
    assert "all blocks together" not in text


def test_the_method_is_said_as_in_the_report(tiny, tmp_path):
    model = tiny("llama")
    dry = planned(model, tmp_path / "out", enable_alg_ext=True)
    report = quantize(model, tmp_path / "out", enable_alg_ext=True, verify=False).report
    assert "the last one by the model's predictions" in report["method"]
    assert f"method:  {report['method']}; " in dry.text


def test_a_file_of_importances_takes_the_place_of_rows(tiny, tmp_path):
    dry = planned(tiny("llama"), tmp_path / "out", iters=0, disable_opt_rtn=False)
    assert workload(dry.job).rows == 6
    assert "4 rows of 16 tokens" in dry.text
    steered = replace(dry.job, importance={"a tensor": torch.ones(1)})
    assert workload(steered).rows == 0
    assert "method:  round to nearest, searched range\n" in replace(dry, job=steered).text


def test_what_tuning_all_blocks_together_takes(tiny, tmp_path):
    given = {"distill_nsamples": 3, "distill_steps": 300}
    dry, plain = planned(tiny("llama"), tmp_path / "out", **given), planned(tiny("llama"), tmp_path / "out")
    assert "for 300 steps of all blocks together, on 3 rows of their own" in dry.text
    count = sum(math.prod(layer.shape) for layer, _ in dry.job.quantized().values())
    assert dry.disk.scratch == plain.disk.scratch + 28 * count
    assert f"states of distill_steps {size(28 * count)}" in dry.text
    assert dry.memory.host_stage.name == "all blocks"
    assert dry.memory.host_stage.host["offsets and moments"] == 12 * count
    assert dry.estimate.seconds > dry.estimate.together > 0 == plain.estimate.together
    works = (replace(workload(dry.job), together=DistillConfig(steps=steps)) for steps in (100, 200))
    cost, longer = (estimate(work, dry.memory, RATES).together for work in works)
    assert 1.8 < longer / cost < 2.0


@pytest.mark.parametrize(
    ("given", "room", "expected"),
    [
        pytest.param({}, 1, 4.5, id="one of two stays"),
        pytest.param({}, None, 4.0, id="all stay", marks=pytest.mark.slow),
        pytest.param({"memory": "low"}, None, 5.0, id="none stays", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_all_blocks_counts_the_passes_that_it_takes(
    tiny, tmp_path, monkeypatch, given, room, expected
):
    model = tiny("qwen3", **HEADS)
    given = {"bits": 2, "iters": 1, "distill_steps": 2, "distill_nsamples": 64, **given}
    if room is not None:
        work = workload(planned(model, tmp_path / "out", **given).job)
        unit = Together.of(work, MemoryLevel(0, StreamPlace.HOST)).stay()[-1]
        monkeypatch.setattr(states, "STAY_BYTES", unit * room)
        monkeypatch.setattr(states, "SOME_STAY_BYTES", unit * room)
    dry = planned(model, tmp_path / "out", **given)
    assert passes(workload(dry.job), dry.memory.level) == expected
    held_out, step, ran = [], [], []

    def forward(self, block, inputs, out):
        ran.append(len(inputs[0]))
        return plain(self, block, inputs, out)

    def differentiable(self, rounded, inputs, args):
        ran.append(3 * len(inputs[0]))  # gradients of inputs and weights are as many products again, each
        return through(self, rounded, inputs, args)

    def sweep(self, *args):
        held_out.extend(ran)
        ran.clear()
        loss = whole(self, *args)
        step.append(sum(ran))
        ran.clear()
        return loss

    plain, through, whole = OpenUnit._run, Student.run, Sweep.step
    monkeypatch.setattr(OpenUnit, "_run", forward)
    monkeypatch.setattr(Student, "run", differentiable)
    monkeypatch.setattr(Sweep, "step", sweep)
    result = quantize(model, tmp_path / "out", dataset=token_rows(70), verify=False, **given)
    units, rows = len(dry.job.source.blocks), workload(dry.job).held_out
    assert step == [expected * 64 * units] * 2
    told = result.report["distillation"]
    packed = 1 if told["kept_step"] else 0
    assert sum(held_out + ran) == (1 + len(told["looks"]) + packed) * rows * units
    assert len(told["looks"]) - 1 + LOOKS_BESIDE == 1 + len(told["looks"]) + 1


def test_what_lies_at_the_output_is_reported_and_kept(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "out.partial").mkdir()
    dry = planned(tiny("llama"), tmp_path / "out")
    assert "thesis.txt" in dry.blocked
    assert "would be refused" in dry.text
    assert "the same command continues it" in dry.text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["out", "out.partial", "thesis.txt"]


def test_a_run_that_would_be_refused_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="group_size"):
        planned(tiny("llama"), tmp_path / "out", group_size=48)
    with pytest.raises(UnsupportedError, match="5 bits"):
        planned(tiny("llama"), tmp_path / "out", bits=5)


def test_estimates_grow_with_the_work(tiny, tmp_path):
    model = tiny("llama", max_position_embeddings=4096)

    def expected(**given):
        return expected_of(planned(model, tmp_path / "out", **given))

    base = expected()
    assert expected(iters=200).seconds > 10 * base.seconds
    large, small = expected(nsamples=512, seqlen=2048), expected(nsamples=512, seqlen=1024)
    assert large.host_bytes > small.host_bytes
    plain = expected(iters=0, disable_opt_rtn=True)
    assert plain.seconds < base.seconds
    assert base.device_bytes == 0


def test_only_the_chosen_experts_count_in_time(tiny, tmp_path):
    def seconds(chosen):
        experts = {"moe_intermediate_size": 32, "num_experts_per_tok": chosen}
        dry = planned(tiny("qwen3_moe", **HEADS, **experts), tmp_path / "out")
        return expected_of(dry, Rates(operations=1e6, bandwidth=1e12)).seconds

    assert seconds(1) < seconds(2) < seconds(4)


def test_sizes_of_the_streams(tiny, tmp_path):
    job = planned(tiny("llama"), tmp_path / "out", nsamples=24, seqlen=16).job
    sizes = measure_sizes(workload(job))
    assert sizes.tokens == 27 * 16  # 24 rows and an eighth held out
    assert sizes.stream == 27 * 16 * 64 * torch.bfloat16.itemsize


def test_rows_are_no_longer_than_the_context(tiny, tmp_path):
    job = planned(tiny("llama"), tmp_path / "out", nsamples=24, seqlen=2048).job
    assert measure_sizes(workload(job)).tokens == 27 * 64


@pytest.mark.parametrize(
    ("given", "said"), [({}, True), ({"smooth": 0}, False), ({"scheme": "W4A16", "group_size": 32}, False)]
)
def test_smoothing_is_told_beforehand(tiny, tmp_path, given, said):
    model = tiny("llama", hidden_size=64, intermediate_size=96)
    dry = planned(model, tmp_path / "out", **{"scheme": "MXFP4", "group_size": None, **given})
    assert ("large channels of inputs divided (smoothing, strength 0.5), then SignRound" in dry.text) == said
