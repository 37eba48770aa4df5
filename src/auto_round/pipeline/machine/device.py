"""Where blocks run, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from auto_round.errors import ConfigError
from auto_round.log import logger

TOKENS_AT_ONCE = 1024
"""Tokens that go through a block at once on a CPU (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that a run works on, and what lies where by the user's wish.

    Attributes:
        main: where what flows is held, and all that is not placed elsewhere.
        others: further ones, in the user's order.
        free: further ones that "auto" leaves to the run: for targets ahead, or to spread over them.
        rules: name or pattern of layers -> where they are tuned; empty where matrices are spread over all.
    """

    main: torch.device
    others: tuple[torch.device, ...] = ()
    rules: tuple[tuple[str, torch.device], ...] = ()
    free: tuple[torch.device, ...] = ()


def choose_devices(wanted: str | Mapping[str, object]) -> Devices:
    """The devices of a `device_map`; "auto" takes all accelerators that there are.

    The first device of a list is the main one; of a mapping that of the key "", else its first accelerator.
    It is said that 0, the device of other versions when none is named, means the CPU on a machine without an
    accelerator. "disk" says nothing: weights are on disk before and after they are worked on anyway.

    Raises:
        ConfigError: a device that is not there, be it the first or not, or no device's name.
    """
    free = tuple[torch.device, ...]()
    if isinstance(wanted, str):
        found = [_device(name) for name in (word.strip() for word in wanted.split(","))]
        main, rules = found[0], tuple[tuple[str, torch.device], ...]()
        if wanted.strip() == "auto" and main.type != "cpu":
            free = tuple(torch.device(main.type, i) for i in range(1, torch.accelerator.device_count()))
        if wanted.split(",")[0].strip() == "0" and main.type == "cpu":
            logger.warning("device 0: PyTorch sees no accelerator here, so blocks are tuned on the CPU")
    else:
        placed = {key: _device(str(name)) for key, name in wanted.items() if name != "disk"}
        found = sorted(placed.values(), key=lambda device: device.type == "cpu")
        found = found or [_device("cpu" if wanted else "auto")]
        main = placed.get("", found[0])
        rules = tuple((key, device) for key, device in placed.items() if key)
    others = tuple(device for device in dict.fromkeys(found) if device != main)
    return Devices(main, others, rules, free)


def choose_device(wanted: str | Mapping[str, object]) -> torch.device:
    """The main device of a `device_map`, see `choose_devices`."""
    return choose_devices(wanted).main


def device_of_rank(wanted: str | Mapping[str, str], local: int, beside: int = 0) -> str | Mapping[str, str]:
    """What a process asks `choose_devices` for, where several on one machine were asked for the same.

    Args:
        wanted: what the user asked for; of several accelerators each process takes one, or an equal share
            where there are more of them than processes.
        local: number of the process among those of its machine.
        beside: how many there are on the machine; 0 where that is not known.
    """
    if _accelerator() is None or not isinstance(wanted, str):
        return wanted
    named = [word.strip() for word in wanted.split(",")]
    if named == ["auto"]:
        named = [str(i) for i in range(max(torch.accelerator.device_count(), local + 1))]
    share = len(named) // beside if beside else 1
    if share > 1:
        return ",".join(named[local * share : (local + 1) * share])
    return named[local % len(named)]


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
        raise ConfigError(
            f'unknown device "{name}": use "auto", "cpu", "cuda:0", an index, several of them ("0,1"), or '
            "from Python a mapping of layers to devices"
        ) from error
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


def rows_at_once(device: torch.device, length: int) -> int:
    """Rows that go through a block at once while it is tuned and memory is at hand; 0 for whole batches.

    A processor computes a thousand tokens as fast as many thousands, and what the backward pass needs of them
    stays near its caches; an accelerator wants all it can get.

    Args:
        device: where blocks run.
        length: tokens in a row.
    """
    return max(1, TOKENS_AT_ONCE // length) if device.type == "cpu" else 0


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
