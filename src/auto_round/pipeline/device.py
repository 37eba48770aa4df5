"""Where blocks run, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.errors import ConfigError
from auto_round.log import logger

TOKENS_AT_ONCE = 1024
"""Tokens that go through a block at once on a CPU (docs/LOG.md)."""


def choose_device(wanted: str | Mapping[str, object]) -> torch.device:
    """Where blocks are tuned: the first device of the map; "auto" takes an accelerator when there is one."""
    if isinstance(wanted, str):
        first = wanted.split(",")[0].strip()
    else:
        first = str(next((d for d in wanted.values() if d not in {"cpu", "disk"}), "cpu"))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if first in {"auto", ""} or first.isdecimal():
        if accelerator is None:
            if first.isdecimal() and first != "0":
                raise ConfigError(f"device {first}: this machine has no accelerator; use --device cpu")
            return torch.device("cpu")
        return torch.device(accelerator.type, int(first) if first.isdecimal() else 0)
    try:
        device = torch.device(first)
    except RuntimeError as error:
        raise ConfigError(f'unknown device "{first}": use "auto", "cpu", "cuda:0" or an index') from error
    if device.type != "cpu" and (accelerator is None or accelerator.type != device.type):
        raise ConfigError(f'device "{first}" is not there: PyTorch sees {accelerator or "no accelerator"}')
    return device


def rows_at_once(device: torch.device, length: int, *, sparing: bool) -> int:
    """Rows that go through a block at once while it is tuned; 0 for whole batches.

    A processor computes a thousand tokens as fast as many thousands, and what the backward pass needs of them
    stays near its caches; an accelerator wants all it can get, unless memory is to be spared.

    Args:
        device: where blocks run.
        length: tokens in a row.
        sparing: whether the user asked for little memory on the accelerator.
    """
    if device.type != "cpu":
        return 1 if sparing else 0
    return max(1, TOKENS_AT_ONCE // length)


def compute_dtype(own: torch.dtype, device: torch.device, *, amp: bool) -> torch.dtype:
    """Dtype in which blocks run.

    bfloat16, or float16 for float16 models on an accelerator; float32 without `amp` and on processors that
    only emulate bfloat16, where it is several times as fast (docs/LOG.md).

    Args:
        own: dtype of the model's weights.
        device: where blocks run.
        amp: whether 16 bits may be used.
    """
    if not amp:
        return torch.float32
    if device.type != "cpu":
        return own if own is torch.float16 else torch.bfloat16
    if has_bfloat16_arithmetic():
        return torch.bfloat16
    logger.info("blocks run in float32: this processor has no bfloat16 arithmetic")
    return torch.float32


def has_bfloat16_arithmetic() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AVX512_BF16, AMX, or Arm's BF16)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        return any("bf16" in name and bool(there) for name, there in capabilities().items())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # before 2.11
