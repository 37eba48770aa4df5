"""Results of tasks as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def task_table(found: Mapping[str, Any]) -> str:
    """The table of `tasks`, beside `tasks_of_original` where it is there; then what gave nothing.

    Args:
        found: as `evaluate.evaluation.evaluate` gives it.
    """
    before = found.get("tasks_of_original")
    head = ["task", "questions", "shots", "metric", *(["original"] if before else []), "model"]
    if before:
        head.append("flips")
    rows = [head, *_rows(found, before)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    failed = found["tasks"].get("failed", {})
    return "\n".join([*lines, *(f"{task} gave nothing: {why}" for task, why in failed.items())])


def _rows(found: Mapping[str, Any], before: Mapping[str, Any] | None) -> Iterator[list[str]]:
    for task, result in found["tasks"].items():
        if task == "failed":
            continue
        label = [result["name"], _shown(result["samples"]), _shown(result["num_fewshot"])]
        for metric, part in result["metrics"].items():
            cells: Sequence[str] = [_with_error(part)]
            if before is not None:
                first = before.get(task, {}).get("metrics", {}).get(metric)
                changed = found["flips"].get(task, {}).get(metric)
                cells = ["" if first is None else _with_error(first), *cells, _flips(changed)]
            yield [*label, metric, *cells]
            label = ["", "", ""]


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _with_error(part: Mapping[str, Any]) -> str:
    value, error = part["value"], part["error"]
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _flips(changed: Mapping[str, Any] | None) -> str:
    if changed is None:
        return ""
    lost, won = changed["right_to_wrong"], changed["wrong_to_right"]
    return f"{100 * changed['share']:.1f} % ({lost} lost, {won} won)"
