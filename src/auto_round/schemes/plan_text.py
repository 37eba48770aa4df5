"""A plan as a table for people, with one row for all blocks that look alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from auto_round.facts.layer import Layer
from auto_round.schemes.condense import condense
from auto_round.schemes.entry import CHOSEN, PlanEntry
from auto_round.schemes.size import PlanSize

_Row = tuple[str, ...]


def render_plan(
    entries: Mapping[str, PlanEntry],
    layers: Sequence[Layer],
    size: PlanSize,
    warnings: Iterable[str] = (),
) -> str:
    """Text of a plan: quantized rows, kept rows with their reason, warnings, bits per weight and size."""
    rows = _rows(entries, layers)
    quantized = [row[1:] for row in rows if row[0] == "quantized"]
    kept = [row[1:] for row in rows if row[0] == "kept"]
    lines = ["quantized:", *_align(quantized)] if quantized else ["quantized: nothing"]
    if kept:
        lines += ["kept:", *_align(kept)]
    lines += [f"warning: {warning}" for warning in warnings]
    lines += _totals(size, len(layers))
    return "\n".join(lines)


def _rows(entries: Mapping[str, PlanEntry], layers: Sequence[Layer]) -> list[_Row]:
    """Kind, names, shape, what they get, and why; layers that agree in all but their numbers share a row."""
    alike: dict[_Row, list[str]] = {}
    for layer in layers:
        entry = entries[layer.name]
        shape = f"{layer.shape[0]}x{layer.shape[1]}"
        fmt = None if entry.scheme is None else entry.scheme.weight_format()
        if fmt is None:
            key: _Row = ("kept", shape, entry.why(layer.name))
        else:
            bits = f"{fmt.bits_per_weight(layer.shape):.3f} bpw"
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


def _totals(size: PlanSize, n_layers: int) -> list[str]:
    share = size.total_bytes / size.source_bytes if size.source_bytes else 1.0
    return [
        f"{size.quantized_layers} of {n_layers} layers, {_count(size.quantized_weights)} weights at "
        f"{size.bits_per_weight:.3f} bits per weight (codes, steps and zero points)",
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
