"""Where a model runs while it is measured, and in which dtype: what `from_pretrained` is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auto_round.config import EvaluationOptions, long_dtype
from auto_round.errors import ConfigError

_SHARE = 0.9
"""Share of an accelerator's free memory that weights may take where a model is spread over several."""


def placement(wanted: str | Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `from_pretrained`; none for the CPU.

    Args:
        wanted: "auto" (an accelerator when there is one), "cpu", an index or device, several by commas
            ("0,1": the model is spread over these), or a mapping of modules to devices.

    Raises:
        ConfigError: a device that is not there, or no device's name.
    """
    if isinstance(wanted, Mapping):
        return {"device_map": {name: str(_device(part)) for name, part in wanted.items()}}
    names = [name.strip() for name in wanted.split(",") if name.strip()] or ["auto"]
    devices = list(dict.fromkeys(_device(name) for name in names))
    if len(devices) == 1:
        return {} if devices[0].type == "cpu" else {"device_map": {"": str(devices[0])}}
    if any(device.type == "cpu" for device in devices):
        raise ConfigError(f'device_map "{wanted}": a model is spread over accelerators only, without the CPU')
    rooms = {device.index or 0: int(_SHARE * _free_bytes(device)) for device in devices}
    return {"device_map": "auto", "max_memory": rooms}


def computing_dtype(options: EvaluationOptions) -> torch.dtype | None:
    """The dtype of `eval_model_dtype`; None for the model's own."""
    name = long_dtype(options.eval_model_dtype or "auto")
    if name == "auto":
        return None
    found: torch.dtype = getattr(torch, name)
    return found


def device_indices(wanted: str | Mapping[str, str]) -> tuple[str, ...]:
    """Indices of the accelerators of "0,1" or "cuda:1"; none for other words.

    They are not looked for: engines in processes of their own find them.
    """
    names = [] if isinstance(wanted, Mapping) else [name.strip() for name in wanted.split(",")]
    found = tuple(name.rpartition(":")[2] for name in names)
    return found if all(index.isdecimal() for index in found) else ()


def _device(name: str) -> torch.device:
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu" or (there is None and name in ("auto", "0")):
        return torch.device("cpu")
    index = "0" if name == "auto" else name
    try:
        device = torch.device(f"{there.type}:{index}" if there is not None and index.isdecimal() else index)
    except RuntimeError as error:
        raise ConfigError(f'unknown device "{name}": use "auto", "cpu", "cuda:0", 0 or "0,1"') from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if there is not None and there.type == device.type else 0
    if (device.index or 0) >= count:
        seen = f"{count} of type {there.type}" if there is not None else "no accelerator"
        raise ConfigError(f'device "{name}" is not there: PyTorch sees {seen}; use --device auto, or cpu')
    return torch.device(device.type, device.index or 0)


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)
