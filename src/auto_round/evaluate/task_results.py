"""What the harness found, as plain numbers, and which answers changed between two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from auto_round.evaluate.harness import Evaluated

_JUDGED: Final = ("acc", "acc_norm", "exact_match")
"""Metrics that say of an answer whether it is right: 1 or 0."""
_DEFAULT_FILTER: Final = "none"


def plain_results(evaluated: Evaluated) -> dict[str, Any]:
    """Task -> `version`, `num_fewshot`, `samples`, `metrics` (name -> `value` and `error`); and `failed`."""
    found: dict[str, Any] = {}
    for part in evaluated.parts:
        for task, entries in part["results"].items():
            counted = part.get("n-samples", {}).get(task, {})
            found[task] = {
                "name": entries.get("alias", task).strip(" -"),
                "version": part["versions"].get(task),
                "num_fewshot": part["n-shot"].get(task),
                "samples": counted.get("effective"),
                "metrics": dict(_metrics(entries)),
            }
    return found | ({"failed": dict(evaluated.failed)} if evaluated.failed else {})


def _metrics(entries: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in entries.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = entries.get(f"{name}_stderr,{kind}")
        shown = name if kind == _DEFAULT_FILTER else f"{name}, {kind}"
        yield shown, {"value": value, "error": error if isinstance(error, float) else None}


def flips(original: Evaluated, model: Evaluated) -> dict[str, dict[str, Any]]:
    """Answers that one model has right and the other wrong, by task and metric.

    A quantized model may be right as often as its original by luck: what it got wrong anew, it got right anew
    elsewhere (Dutta and others 2024, "Accuracy is not all you need").
    """
    first, second = _judgements(original.parts), _judgements(model.parts)
    found: dict[str, dict[str, Any]] = {}
    for (task, metric), before in first.items():
        after = second.get((task, metric), {})
        both = before.keys() & after.keys()
        if not both:
            continue
        lost = sum(before[i] > after[i] for i in both)
        won = sum(before[i] < after[i] for i in both)
        found.setdefault(task, {})[metric] = {
            "right_to_wrong": lost,
            "wrong_to_right": won,
            "samples": len(both),
            "share": (lost + won) / len(both),
        }
    return found


def _judgements(parts: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """(Task, metric) -> question -> 1 where it is answered right."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for part in parts:
        for task, samples in part.get("samples", {}).items():
            for sample in samples:
                for metric in _JUDGED:
                    if metric in sample:
                        found.setdefault((task, metric), {})[sample["doc_id"]] = float(sample[metric])
    return found
