"""Where blocks run, in which dtype, and how many rows at once."""

from __future__ import annotations

import pytest
import torch

from auto_round.config import build_options
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.pipeline.deciding import open_model
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine import device
from auto_round.pipeline.machine.device import (
    choose_device,
    choose_devices,
    compute_dtype,
    device_of_rank,
    rows_at_once,
)

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("own", "where", "emulated", "amp", "dtype"),
    [
        (torch.bfloat16, CPU, False, True, torch.bfloat16),
        (torch.float16, CPU, False, True, torch.bfloat16),
        (torch.bfloat16, CPU, True, True, torch.float32),
        (torch.bfloat16, CPU, False, False, torch.float32),
        (torch.float16, GPU, True, True, torch.float16),
        (torch.float32, GPU, True, True, torch.bfloat16),
        (torch.float16, GPU, True, False, torch.float32),
    ],
)
def test_compute_dtype(monkeypatch, own, where, emulated, amp, dtype):
    monkeypatch.setattr(device, "has_bfloat16_arithmetic", lambda: not emulated)
    assert compute_dtype(own, where, amp=amp) is dtype


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "cpu_name": "x"}, False),
        ({"bf16": True, "neon": True}, True),
    ],
)
def test_processors_are_asked_for_bfloat16(monkeypatch, flags, there):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert device.has_bfloat16_arithmetic() is there


@pytest.mark.parametrize(
    ("where", "length", "rows"), [(CPU, 512, 2), (CPU, 2048, 1), (CPU, 16, 64), (GPU, 512, 0)]
)
def test_rows_at_once(where, length, rows):
    assert rows_at_once(where, length) == rows


def pretend(monkeypatch, count):
    """Make PyTorch say that there are so many CUDA devices."""
    found = torch.device("cuda") if count else None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(count))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.mark.parametrize("accelerators", [0, 2])
@pytest.mark.parametrize(
    ("wanted", "without", "with_two"),
    [
        ("auto", "cpu", "cuda:0"),
        ("cpu", "cpu", "cpu"),
        ("cpu:0", "cpu", "cpu"),
        ("0", "cpu", "cuda:0"),
        ({}, "cpu", "cuda:0"),
        ({"": "0"}, "cpu", "cuda:0"),
        ({"model": "cpu", "lm_head": "disk"}, "cpu", "cpu"),
        ({"model": "disk"}, "cpu", "cpu"),
        ("1", None, "cuda:1"),
        ("0,1", None, "cuda:0"),
        (" 1 , 0 ", None, "cuda:1"),
        ("cuda", None, "cuda:0"),
        ("cuda:1", None, "cuda:1"),
        ({"model": "cpu", "lm_head": "cuda:1"}, None, "cuda:1"),
        ("2", None, None),
        ("cuda:2", None, None),
        ("0,7", None, None),
        ({"model": "cuda:0", "lm_head": "cuda:9"}, None, None),
        ("xpu", None, None),
        ("meta", None, None),
        ("gpu9", None, None),
        ("-1", None, None),
        ("cuda:-1", None, None),
        ("0,", None, None),
        ("balanced", None, None),
    ],
)
def test_devices(monkeypatch, accelerators, wanted, without, with_two):
    pretend(monkeypatch, accelerators)
    expected = with_two if accelerators else without
    if expected is None:
        with pytest.raises(ConfigError, match=r"device \".*\".*auto"):
            choose_device(wanted)
    else:
        assert choose_device(wanted) == torch.device(expected)


@pytest.mark.parametrize(("count", "said"), [(0, 1), (2, 0)])
def test_device_0_on_a_machine_without_accelerators_is_said(monkeypatch, caplog, count, said):
    pretend(monkeypatch, count)
    monkeypatch.setattr(logger, "propagate", True)
    choose_device("0")
    assert ["no accelerator here" in message for message in caplog.messages] == [True] * said


@pytest.mark.parametrize(
    ("wanted", "main", "others", "rules"),
    [
        ("0,1", "cuda:0", ["cuda:1"], []),
        ("1,cpu", "cuda:1", ["cpu"], []),
        ("0,cuda:0,cuda", "cuda:0", [], []),
        ("auto", "cuda:0", [], []),
        ({"a": "cpu", "b": "1"}, "cuda:1", ["cpu"], [("a", "cpu"), ("b", "cuda:1")]),
        ({"": "cpu", "experts": "0", "x": "disk"}, "cpu", ["cuda:0"], [("experts", "cuda:0")]),
    ],
)
def test_several_devices(monkeypatch, wanted, main, others, rules):
    pretend(monkeypatch, 2)
    found = choose_devices(wanted)
    assert str(found.main) == main
    assert list(map(str, found.others)) == others
    assert [(key, str(device)) for key, device in found.rules] == rules


@pytest.mark.parametrize(
    ("wanted", "beside", "found"),
    [
        ("auto", 0, ["0", "1", "2", "3"]),
        ("auto", 4, ["0", "1", "2", "3"]),
        ("auto", 2, ["0,1", "2,3"]),
        ("auto", 1, ["0,1,2,3"]),
        ("3,2", 2, ["3", "2"]),
        ("3,2,1,0", 2, ["3,2", "1,0"]),
        ("cpu", 2, ["cpu", "cpu"]),
    ],
)
def test_devices_of_ranks(monkeypatch, wanted, beside, found):
    pretend(monkeypatch, 4)
    assert [device_of_rank(wanted, local, beside) for local in range(len(found))] == found


def test_a_device_that_is_not_there_is_refused_before_anything_is_looked_up(monkeypatch):
    monkeypatch.setattr(open_model, "resolve_model", lambda *given, **named: pytest.fail("looked up"))
    with pytest.raises(ConfigError, match="cuda:63"):
        prepare(build_options({"model": "some/model", "device_map": "cuda:63"}))
