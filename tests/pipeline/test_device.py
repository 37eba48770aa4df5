"""Where blocks run, in which dtype, and how many rows at once."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import ConfigError
from auto_round.pipeline import device
from auto_round.pipeline.device import choose_device, compute_dtype, rows_at_once

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
    ("where", "length", "sparing", "rows"),
    [
        (CPU, 512, False, 2),
        (CPU, 2048, False, 1),
        (CPU, 16, True, 64),
        (GPU, 512, False, 0),
        (GPU, 512, True, 1),
    ],
)
def test_rows_at_once(where, length, sparing, rows):
    assert rows_at_once(where, length, sparing=sparing) == rows


def test_devices_that_are_not_there_are_refused():
    assert choose_device("cpu") == CPU
    assert choose_device({"model": "cpu", "lm_head": "disk"}) == CPU
    if not torch.accelerator.is_available():
        assert choose_device("auto") == CPU
        for name in ("cuda:0", "1", {"model": "cuda:1"}):
            with pytest.raises(ConfigError, match="accelerator"):
                choose_device(name)
    with pytest.raises(ConfigError, match="unknown device"):
        choose_device("gpu9")
