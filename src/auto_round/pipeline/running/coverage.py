"""How well the calibration data cover the experts: read from the journal's entries, like `hard_cases`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WORST = 8
"""Experts that a report names, those with the fewest tokens."""


def coverage(entries: Sequence[Mapping[str, Any]], wanted: int = 0) -> dict[str, Any]:
    """What the report says of the experts of a model; empty where it has none or none was run.

    Args:
        entries: of the journal, one a group of blocks or a layer.
        wanted: tokens that each expert was to see.

    Returns:
        `experts`: how many there are, `unseen`: how many saw no token, `fewest`: least tokens of any; with
        `wanted` also `below`: how many saw fewer, and `fewest_tokens`: name -> tokens of some of them.
    """
    found = dict(_tokens(entries))
    if not found:
        return {}
    counts = found.values()
    said: dict[str, Any] = {
        "experts": len(found),
        "unseen": sum(count == 0 for count in counts),
        "fewest": min(counts),
    }
    below = sorted((count, name) for name, count in found.items() if count < wanted)
    if wanted:
        said |= {"wanted": wanted, "below": len(below)}
        said["fewest_tokens"] = {name: count for count, name in below[:WORST]}
    return said


def coverage_sentence(found: Mapping[str, Any]) -> str:
    """A warning for people; empty where every expert saw what it should."""
    if below := found.get("below", 0):
        return (
            f"{below} of {found['experts']} experts saw fewer than {found['wanted']} calibration tokens, "
            f"{found['unseen']} of them none"
        )
    if unseen := found.get("unseen", 0):
        return (
            f"{unseen} of {found['experts']} experts saw no calibration token and were rounded without data "
            "(more rows: --nsamples, or --expert_rows 128, which adds rows until each expert saw so many)"
        )
    return ""


def _tokens(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """Name of an expert -> tokens that reached it."""
    for entry in entries:
        for module, counts in entry.get("experts", {}).items():
            yield from ((f"{module}.{number}", count) for number, count in enumerate(counts))
