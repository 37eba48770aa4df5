"""What a machine computes with, as far as it decides the last bit of a sum."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from typing import Any

import torch

from auto_round.compiled import find_compiler
from auto_round.config.env import arithmetic_variables
from auto_round.export.table import EXPORTERS

LIBRARIES = tuple(dict.fromkeys(("triton", *(exporter.library for exporter in EXPORTERS.values()))))
"""Packages whose code takes part in what is written, beside PyTorch."""


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, accelerator and the settings of their libraries, as JSON values.

    The same numbers give other sums on processors with other instructions, and PyTorch's libraries can be
    told to leave instructions alone. Without a compiler PyTorch sums up what our programs do, in another
    order.

    Args:
        device: where blocks are tuned.
    """
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
        "compiler": find_compiler() is not None,
        "accelerator": None if device.type == "cpu" else _accelerator(device),
        "settings": arithmetic_variables(),
        "float32_products": torch.get_float32_matmul_precision(),
    }


def versions() -> dict[str, str | None]:
    """Versions of `LIBRARIES`; None for one that is not installed."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _capabilities() -> dict[str, Any]:
    """What PyTorch knows of the processor; nothing before 2.11."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {} if ask is None else dict(ask())


def _processor() -> str:
    return str(_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def _instructions() -> str:
    """Digest of everything that PyTorch knows, the number of cores aside."""
    known = {name: value for name, value in _capabilities().items() if not name.startswith("num_")}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _accelerator(device: torch.device) -> str:
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return device.type if name is None else str(name(device))
