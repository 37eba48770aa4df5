"""Where blocks run, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.pipeline.machine.limits import usable_cores

TOKENS_AT_ONCE = 1024
"""Tokens that go through a block at once on a CPU (docs/LOG.md)."""


def choose_device(wanted: str | Mapping[str, object]) -> torch.device:
    """Where blocks are tuned: the first device of the map; "auto" takes an accelerator when there is one.

    Devices after the first are not used, which is said. So is that 0, the device of other versions when none
    is named, means the CPU on a machine without an accelerator.

    Raises:
        ConfigError: a device that is not there, be it the first or not, or no device's name.
    """
    named = _named(wanted)
    devices = list(dict.fromkeys(_device(name) for name in named))
    if named[0] == "0" and devices[0].type == "cpu":
        logger.warning("device 0: PyTorch sees no accelerator here, so blocks are tuned on the CPU")
    if len(devices) > 1:
        others = ", ".join(map(str, devices[1:]))
        logger.warning("blocks are tuned on one device at a time: %s is used, not %s", devices[0], others)
    return devices[0]


def device_of_rank(wanted: str | Mapping[str, str], local: int) -> str | Mapping[str, str]:
    """What a process asks `choose_device` for, where several on one machine were asked for the same.

    Args:
        wanted: what the user asked for; of several accelerators each process takes one.
        local: number of the process among those of its machine.
    """
    if _accelerator() is None or not isinstance(wanted, str):
        return wanted
    named = _named(wanted)
    if named == ["auto"]:
        return str(local)
    return named[local % len(named)]


def _named(wanted: str | Mapping[str, object]) -> list[str]:
    """Names of devices in the order of their use; of a map the accelerators first."""
    if isinstance(wanted, str):
        named = [name.strip() for name in wanted.split(",")]
    else:
        named = sorted((str(name) for name in wanted.values() if name != "disk"), key=_is_cpu)
    return named or ["auto" if not wanted else "cpu"]


def _is_cpu(name: str) -> bool:
    return name == "cpu"


def _device(name: str) -> torch.device:
    """The device of one name."""
    found = _accelerator()
    if found is None and name in ("auto", "0"):
        return torch.device("cpu")
    if name == "auto":
        name = "0"
    try:
        full = f"{found.type}:{name}" if found is not None and name.isdecimal() else name
        device = torch.device(full)
    except RuntimeError as error:
        if name.isdecimal():
            raise _not_there(name, "no accelerator") from error
        raise ConfigError(f'unknown device "{name}": use "auto", "cpu", "cuda:0" or an index') from error
    if device.type == "cpu":
        return torch.device("cpu")
    if found is None or found.type != device.type:
        raise _not_there(name, "no accelerator" if found is None else found.type)
    count = torch.accelerator.device_count()
    index = -1 if full == device.type else device.index
    if index >= count:
        raise _not_there(name, f"{count} of type {device.type}")
    return torch.device(device.type, max(0, index))


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _not_there(name: str, seen: str) -> ConfigError:
    return ConfigError(f'device "{name}" is not there: PyTorch sees {seen}; use --device auto, or cpu')


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


def warn_of_threads(device: torch.device) -> None:
    """Warn where PyTorch, which counts the machine's cores, wants far more threads than a container has."""
    threads, cores = torch.get_num_threads(), usable_cores()
    if device.type == "cpu" and threads > 2 * cores:
        logger.warning(
            "PyTorch computes with %d threads, but this process may use %d cores: set OMP_NUM_THREADS=%d",
            *(threads, cores, cores),
        )
