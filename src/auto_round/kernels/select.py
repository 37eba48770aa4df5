"""Which kernel runs a layer: the one of highest priority that does not refuse."""

from __future__ import annotations

from auto_round.errors import ConfigError, Refusal, UnsupportedError, nearest
from auto_round.kernels.kernel import Kernel, LinearSpec
from auto_round.kernels.table import KERNELS, LATER, Entry

AUTO = "auto"
"""Backend that leaves the choice to the table."""


def select_kernel(spec: LinearSpec, backend: str = AUTO) -> Kernel:
    """Kernel for one layer.

    Args:
        spec: the layer.
        backend: `auto`, or a kernel's name or alias in any case.

    Raises:
        ConfigError: a backend that is not known.
        UnsupportedError: no kernel fits, with each one's reason.
    """
    asked = backend.casefold()
    entries = _candidates(asked)
    refusals = []
    for entry in sorted(entries, key=lambda e: -e.priority):
        refusal = entry.kernel.refuses(spec) or (_reluctance(entry, spec) if asked == AUTO else None)
        if refusal is None:
            return entry.kernel
        refusals.append(refusal)
    raise UnsupportedError(
        f"no kernel for {spec.fmt.name} weights {list(spec.shape)} with {spec.dtype} activations on "
        f'{spec.device} (backend="{backend}")',
        refusals,
    )


def _candidates(asked: str) -> list[Entry]:
    if asked == AUTO:
        return list(KERNELS.values())
    found = [e for name, e in KERNELS.items() if asked in (name, *e.aliases)]
    if found:
        return found
    if asked in LATER:
        raise UnsupportedError(
            f'backend "{asked}" is not in this version yet',
            [Refusal(asked, "not in this version", f'use backend="auto" or backend="{LATER[asked]}"')],
        )
    names = [AUTO, *KERNELS, *(alias for e in KERNELS.values() for alias in e.aliases)]
    raise ConfigError(f'unknown backend "{asked}"; {nearest(asked, names)}')


def _reluctance(entry: Entry, spec: LinearSpec) -> Refusal | None:
    if entry.unasked is None or spec.dtype in entry.unasked:
        return None
    computed = entry.kernel.compute_dtype(spec)
    return Refusal(
        entry.kernel.name,
        f"computes in {computed}, which is less exact than the {spec.dtype} asked for",
        f'name it if that will do: backend="{entry.kernel.name}"',
    )
