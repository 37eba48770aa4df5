"""What a comparison of two models gave, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from auto_round.cli.task_table import task_table

_NEAR_NOISE = 3.0
"""A divergence below so many times the noise floor is called noise."""


def evaluated(found: Mapping[str, Any]) -> str:
    """Lines of the figures that `evaluate.evaluation.evaluate` gives."""
    lines = _lines(found) if "positions" in found else iter([("model", found["model"])])
    parts = ["\n".join(f"{name:<13}{text}" for name, text in lines)]
    if "tasks" in found:
        parts.append(task_table(found))
    return "\n\n".join(parts)


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", found["model"]
    if "original" in found:
        yield "original", found["original"]
    yield (
        "text",
        f"{found['text']}: {found['positions']:,} predictions in {found['rows']} rows of "
        f"{found['row_tokens']} tokens, {found['dtype']}",
    )
    if "kl" not in found:
        yield "perplexity", _with_interval(found["perplexity"])
        return
    yield from _comparison(found)
    yield from _noise(found)
    if "gate" in found:
        gate = found["gate"]
        words = "within" if gate["passed"] else "ABOVE"
        yield "gate", f"mean KL {found['kl']['mean']['value']:.4g} is {words} {gate['max_kl']:g}"


def _comparison(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    before, after = found["perplexity_original"]["value"], found["perplexity"]["value"]
    yield "perplexity", f"{before:.5g} -> {after:.5g}, ratio {_with_interval(found['perplexity_ratio'])}"
    for label, name in (("KL", "kl"), ("KL reversed", "kl_reverse")):
        part = found[name]
        yield label, f"mean {_with_interval(part['mean'])} nats per token"
        shares = {"median": "median", "p90": "90 %", "p99": "99 %", "p99_9": "99.9 %"}
        listed = [f"{words} {part[key]['value']:.4g}" for key, words in shares.items()]
        yield "", ", ".join([*listed, f"largest {part['largest']:.4g}"])
    moved = found["probability_difference"]
    yield (
        "probability",
        f"of the text's token: RMS difference {_percent(moved['rms'])}, mean {_percent(moved['mean'])}",
    )
    shared = ", ".join(
        f"{100 * part['value']:.1f} % of the {k} likeliest" for k, part in found["top_k"].items()
    )
    yield "same top", f"{_percent(found['same_top'])}; shared: {shared}"
    for row in found["by_confidence"]:
        yield (
            f"  {row['from']:.1f} to {row['to']:.1f}",
            f"KL {row['kl']:.4g}, same top {100 * row['same_top']:.1f} % "
            f"({row['positions']:,} predictions of which the original is so sure)",
        )


def _noise(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if halves := found["halves"]:
        yield "halves", f"KL {halves['even_rows']:.4g} on even rows, {halves['odd_rows']:.4g} on odd ones"
    if floor := found.get("noise_floor"):
        text = (
            f"KL {floor['kl']:.2g}, same top {100 * floor['same_top']:.2f} % of the original in "
            f"{floor['dtype']} ({floor['rows']} rows)"
        )
        if found["kl"]["mean"]["value"] < _NEAR_NOISE * floor["kl"]:
            text += ": the model differs from its original hardly more than that"
        yield "noise floor", text


def _with_interval(part: Mapping[str, float]) -> str:
    return f"{part['value']:.5g} ({part['low']:.5g} to {part['high']:.5g})"


def _percent(part: Mapping[str, float]) -> str:
    return f"{100 * part['value']:.2f} % ({100 * part['low']:.2f} to {100 * part['high']:.2f})"
