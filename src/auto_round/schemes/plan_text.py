"""A plan as a table for people, with one row for all blocks that look alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from auto_round.facts.layer import Layer
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import CHOSEN, PlanEntry
from auto_round.schemes.size import PlanSize

CODES: Final = "codes, steps and zero points"
"""What the bits of a quantized weight hold, in formats that pack."""

_Row = tuple[str, ...]


def render_plan(
    entries: Mapping[str, PlanEntry],
    layers: Sequence[Layer],
    size: PlanSize,
    warnings: Iterable[str] = (),
    stored_bytes: Mapping[str, int] | None = None,
    holding: str = CODES,
) -> str:
    """Text of a plan: quantized rows, kept rows with their reason, warnings, bits per weight and size.

    Args:
        entries: layer name -> what becomes of it.
        layers: every layer.
        size: of the plan, counted with the same `stored_bytes`.
        warnings: of the plan.
        stored_bytes: layer name -> bytes on disk, where an exporter knows better than the format alone.
        holding: what these bits hold.
    """
    rows = _rows(entries, layers, stored_bytes or {})
    quantized = [row[1:] for row in rows if row[0] == "quantized"]
    kept = [row[1:] for row in rows if row[0] == "kept"]
    lines = ["quantized:", *_align(quantized)] if quantized else ["quantized: nothing"]
    if kept:
        lines += ["kept:", *_align(kept)]
    lines += [f"warning: {warning}" for warning in warnings]
    lines += _totals(size, len(layers), holding)
    return "\n".join(lines)


def _rows(entries: Mapping[str, PlanEntry], layers: Sequence[Layer], stored: Mapping[str, int]) -> list[_Row]:
    """Kind, names, shape, what they get, and why; layers that agree in all but their numbers share a row."""
    alike: dict[_Row, list[str]] = {}
    for layer in layers:
        entry = entries[layer.name]
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        fmt = None if entry.scheme is None else entry.scheme.weight_format()
        if fmt is None:
            key: _Row = ("kept", shape, entry.why(layer.name))
        else:
            nbytes = stored.get(layer.name)
            each = fmt.bits_per_weight(layer.shape) if nbytes is None else nbytes * 8 / layer.weights
            bits = f"{each:.3f} bpw"
            why = entry.why(layer.name)
            key = ("quantized", shape, entry.label, bits, why if entry.fixed or why == CHOSEN else "")
        alike.setdefault(key, []).append(layer.name)
    first = {layer.name: i for i, layer in enumerate(layers)}
    rows = [
        (first[n.first], (key[0], str(n), *key[1:])) for key, names in alike.items() for n in condense(names)
    ]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _align(rows: Sequence[_Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _totals(size: PlanSize, n_layers: int, holding: str) -> list[str]:
    share = size.total_bytes / size.source_bytes if size.source_bytes else 1.0
    return [
        f"{size.quantized_layers} of {n_layers} layers, {_count(size.quantized_weights)} weights at "
        f"{size.bits_per_weight:.3f} bits per weight ({holding})",
        f"whole model: {size.bits_per_weight_overall:.2f} bits per weight, "
        f"{_bytes(size.source_bytes)} -> {_bytes(size.total_bytes)} ({share:.0%})",
    ]


def _count(n: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return str(n)


def _bytes(n: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n} B"
