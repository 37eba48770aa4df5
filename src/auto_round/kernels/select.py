"""Which kernel runs a layer: the one of highest priority that does not refuse."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.kernels.check import trial
from auto_round.kernels.kernel import Kernel, LinearSpec
from auto_round.kernels.table import ABSENT, KERNELS, STAND_INS, KernelRow
from auto_round.log import logger

AUTO = "auto"
"""Backend that leaves the choice to the table."""


def select_kernel(
    spec: LinearSpec, backend: str = AUTO, kernels: Mapping[str, KernelRow] = KERNELS
) -> Kernel:
    """Kernel for one layer.

    Args:
        spec: the layer.
        backend: `auto`, or a kernel's name or alias in any case.
        kernels: the table among whose rows the choice is made.

    Raises:
        ConfigError: a backend that is not known.
        UnsupportedError: no kernel fits, with each one's reason.
    """
    asked = backend.casefold()
    unnamed = asked == AUTO or asked in STAND_INS
    entries = _candidates(asked, kernels)
    refusals = []
    for entry in sorted(entries, key=lambda e: -e.priority):
        refusal = _leaves_inputs(entry, spec) or entry.kernel.refuses(spec)
        refusal = refusal or (_reluctance(entry, spec) if unnamed else None)
        if refusal is None and entry.tried:
            refusal = trial(entry.kernel, spec)
        if refusal is None:
            return entry.kernel
        refusals.append(refusal)
    raise UnsupportedError(
        f"no kernel for {spec.fmt.name} weights {list(spec.shape)} with {spec.dtype} activations on "
        f'{spec.device} (backend="{backend}")',
        refusals,
    )


def describe_kernels(kernels: Mapping[str, KernelRow] = KERNELS) -> dict[str, str]:
    """Kernel -> devices, widths, priority, other names, and whether it can run here, in words."""
    rows = {}
    for name, entry in kernels.items():
        refusal = entry.kernel.refuses(entry.sample)
        state = "can run here" if refusal is None else f"cannot run here: {refusal.reason}"
        if refusal is not None and refusal.remedy:
            state += f" ({refusal.remedy})"
        if entry.named_only:
            state += "; only when named"
        rows[name] = (
            f"{entry.devices}; {entry.bits} bits; priority {entry.priority}; {state}; "
            f"also {', '.join(entry.aliases)}"
        )
    return rows


def _candidates(asked: str, kernels: Mapping[str, KernelRow]) -> list[KernelRow]:
    if asked == AUTO:
        return list(kernels.values())
    found = [e for name, e in kernels.items() if asked in (name, *e.aliases)]
    if found:
        return found
    if asked in STAND_INS:
        _tell(asked)
        return [kernels[name] for name in STAND_INS[asked].names]
    if asked in ABSENT:
        reason, instead = ABSENT[asked]
        raise UnsupportedError(
            f'backend "{asked}" is not in this version',
            [Refusal(asked, reason, f'use backend="auto" or backend="{instead}"')],
        )
    names = [AUTO, *kernels, *(alias for e in kernels.values() for alias in e.aliases), *STAND_INS]
    raise ConfigError(f'unknown backend "{asked}"; {nearest(asked, names)}')


@functools.cache
def _tell(asked: str) -> None:
    """Say once in a process what stands in for a backend."""
    logger.warning('backend "%s" is not here: %s', asked, STAND_INS[asked].reason)


def _leaves_inputs(entry: KernelRow, spec: LinearSpec) -> Refusal | None:
    if spec.inputs is None or entry.inputs:
        return None
    return Refusal(entry.kernel.name, f"does not round inputs, which this layer wants ({spec.inputs.name})")


def _reluctance(entry: KernelRow, spec: LinearSpec) -> Refusal | None:
    name = entry.kernel.name
    if entry.named_only:
        return Refusal(name, entry.named_only, f'name it to use it: backend="{name}"')
    if entry.unasked is None or spec.dtype in entry.unasked:
        return None
    computed = entry.kernel.compute_dtype(spec)
    return Refusal(
        name,
        f"computes in {computed}, which is less exact than the {spec.dtype} asked for",
        f'name it if that will do: backend="{name}"',
    )
