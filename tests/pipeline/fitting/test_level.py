"""Levels from much memory to little, and the one that a run begins with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round.config import build_options
from auto_round.config.memory import MemoryOptions
from auto_round.pipeline.deciding.fit import workload
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.fitting.choose import Room, choose_plan, wants_files
from auto_round.pipeline.fitting.level import MemoryLevel, StreamPlace, levels_of, starts_at
from auto_round.pipeline.fitting.together import STAY
from auto_round.tuning.distill import DistillConfig
from pipeline.runs import ROWS, SHORT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30
PLENTY = Room(0, 64 * GIB, 64 * GIB)


@pytest.fixture(scope="module")
def work(tiny):
    """A run of a tiny model as it is planned."""
    options = build_options({**SHORT, "model": str(tiny("llama")), "output_dir": "out", "batch_size": 8})
    return workload(prepare(options, dataset=ROWS))


def test_levels_of_a_processor():
    levels = levels_of(CPU, 8, 128)
    assert [level.rows for level in levels] == [8, 8, 1, 1]
    assert [level.rounds_again for level in levels] == [False, True, True, True]
    assert [level.streams for level in levels] == [StreamPlace.HOST] * 3 + [StreamPlace.FILES]
    assert len(levels_of(CPU, 8, 4096)) == 3


def test_levels_of_an_accelerator():
    levels = levels_of(GPU, 8, 2048)
    assert [level.rows for level in levels] == [0, 0, 4, 2, 1, 1, 1]
    assert levels[0].streams is StreamPlace.DEVICE
    assert levels[-1].streams is StreamPlace.FILES


@pytest.mark.parametrize("device", [CPU, GPU])
def test_each_level_takes_less(work, device):
    on = replace(work, device=device, seqlen=64, rows=64)
    plans = [
        choose_plan(replace(on, memory=MemoryOptions(memory=word)), PLENTY)
        for word in ("auto", "low", "lowest")
    ]
    peaks = [plan.device_bytes if device is GPU else plan.host_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert [plan.files for plan in plans] == [False, False, True]


@pytest.mark.parametrize(
    ("memory", "rows", "streams"),
    [
        ({}, 0, StreamPlace.DEVICE),
        ({"low_gpu_mem_usage": True}, 1, StreamPlace.HOST),
        ({"memory": "low"}, 1, StreamPlace.HOST),
        ({"memory": "lowest"}, 1, StreamPlace.FILES),
    ],
)
def test_where_a_run_begins(memory, rows, streams):
    levels = levels_of(GPU, 8, 2048)
    level = levels[starts_at(levels, MemoryOptions(**memory))]
    assert (level.rows, level.streams) == (rows, streams)


def test_blocks_stay_on_an_accelerator_only_where_hidden_states_do(work):
    """They held 2 GiB of a small accelerator at every level."""
    distilled = replace(work, device=GPU, seqlen=64, rows=64, together=DistillConfig(steps=2))
    first = choose_plan(distilled, PLENTY)
    below = choose_plan(distilled, Room(0, 64 * GIB, first.device_bytes))  # of which a share is free
    low = choose_plan(replace(distilled, memory=MemoryOptions(low_gpu_mem_usage=True)), PLENTY)
    held = [[s.device[STAY] for s in plan.stages if s.name == "all blocks"] for plan in (first, below, low)]
    assert [plan.level.streams for plan in (first, below, low)] == [
        StreamPlace.DEVICE,
        StreamPlace.HOST,
        StreamPlace.HOST,
    ]
    assert held[0][0] > 0
    assert held[1:] == [[0], [0]]
    on_host = [choose_plan(replace(distilled, device=CPU), Room(0, free, 0)) for free in (64 * GIB, 1 << 20)]
    assert [plan.level.rounds_again for plan in on_host] == [False, True]
    assert len({stage.host[STAY] for plan in on_host for stage in plan.stages if STAY in stage.host}) == 1


@pytest.mark.parametrize(("given", "where"), [({}, "device"), ({"low_gpu_mem_usage": True}, "host")])
def test_what_flows_between_blocks_lies_where_hidden_states_do(work, given, where):
    """As `home_of_streams` has it for both; what is learned lies on the host."""
    on = replace(work, device=GPU, together=DistillConfig(steps=2), memory=MemoryOptions(**given))
    stage = next(stage for stage in choose_plan(on, PLENTY).stages if stage.name == "all blocks")
    for part in ("hidden states", "between blocks"):
        assert {w for w in ("host", "device") if getattr(stage, w).get(part)} == {where}
    assert stage.host["offsets and moments"] > stage.host["moments of a block"] > 0


@pytest.mark.parametrize("accelerator", [40, 20, 10, 5, 1])
def test_the_first_level_that_fits_an_accelerator(work, accelerator):
    large = replace(work, device=GPU, seqlen=2048, rows=4096)
    whole = choose_plan(large, PLENTY).device_bytes
    room = Room(0, 64 * GIB, whole * accelerator // 30)
    plan = choose_plan(large, room)
    assert plan.fits == (plan.device_bytes <= plan.device_room)
    if plan.chosen:
        before = choose_plan(replace(large, memory=MemoryOptions(memory="auto")), PLENTY)
        assert before.device_bytes > plan.device_room
    assert plan.chosen == (0 if accelerator > 32 else plan.chosen)


def test_a_processor_keeps_its_rows_whatever_is_free(work):
    plans = [choose_plan(work, Room(0, free, 0)) for free in (64 * GIB, 1 << 20)]
    assert [plan.level.rows for plan in plans] == [work.tune.rows_at_once] * 2
    assert [plan.level.rounds_again for plan in plans] == [False, True]
    assert [plan.fits for plan in plans] == [True, False]


def test_what_cannot_be_reloaded_is_not_planned(work):
    plans = [choose_plan(work, Room(0, free, 0)) for free in (64 * GIB, work.output_bytes)]
    assert [[stage.name for stage in plan.stages][-1] for plan in plans] == ["verify", "measure"]


HOST = MemoryLevel(1, StreamPlace.HOST)


@pytest.mark.parametrize(
    ("level", "memory", "nbytes", "room", "files"),
    [
        (HOST, {}, 3 * GIB, 8 * GIB, False),
        (HOST, {}, 3 * GIB, 4 * GIB, True),
        (HOST, {}, 1 * GIB, None, False),
        (HOST, {}, 3 * GIB, None, True),
        (HOST, {"low_cpu_mem_usage": False}, 3 * GIB, 1 * GIB, False),
        (MemoryLevel(1, StreamPlace.FILES), {"low_cpu_mem_usage": False}, 1, 8 * GIB, True),
    ],
)
def test_hidden_states_stay_in_memory_while_they_fit(level, memory, nbytes, room, files):
    assert wants_files(level, MemoryOptions(**memory), nbytes, room) is files
