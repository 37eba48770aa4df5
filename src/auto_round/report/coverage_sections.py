"""What a run was calibrated with: rows of data, and the tokens of experts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from auto_round.report import plots_run
from auto_round.report.draw import Words
from auto_round.report.run import Run
from auto_round.report.section import Section
from auto_round.report.table import Cell, Table, number


def coverage(run: Run) -> Section | None:
    """Rows and tokens that a run was calibrated with; None where it needed none."""
    data = run.calibration
    if data is None:
        return None
    rows: list[list[Cell]] = [
        ["rows tuned on", number(data.rows_tuned)],
        ["rows held out", number(data.rows_held_out)],
        ["tokens a row", number(data.tokens_per_row)],
        ["tokens tuned on", number(data.tokens_tuned)],
    ]
    counts = Table("Rows and tokens", ("what", "how many"), rows)
    sources = Table(
        "Sources",
        ("source", "samples read", "rows", "dropped"),
        [
            [
                s.name,
                number(s.samples),
                number(s.rows),
                "; ".join(f"{n} {why}" for why, n in s.dropped.items()) or "none",
            ]
            for s in data.sources
        ],
    )
    letters = Table("Scripts", ("script", "letters"), [[s, number(n)] for s, n in data.letters.items()])
    tables = (counts, *([sources] if data.sources else ()), *([letters] if data.letters else ()))
    return Section("coverage", "Calibration data", (data.summary,), tables=tables)


def experts(run: Run) -> Section | None:
    """Tokens that reached each expert; None where there are no experts."""
    counts = {name: found for unit in run.units for name, found in unit.experts.items()}
    if not counts:
        return None
    least = min(min(found) for found in counts.values())
    unseen = sum(not tokens for found in counts.values() for tokens in found)
    of = sum(map(len, counts.values()))
    text = (
        f"{unseen} of {of} experts saw no token: they were rounded without data. More rows help "
        "(--expert_rows)."
        if unseen
        else f"Every one of {of} experts saw {least:,} tokens or more."
    )
    table = Table(
        "Tokens of experts",
        ("experts", "least", "median", "most", "without any"),
        [[name, *(number(x) for x in _spread_of(found))] for name, found in counts.items()],
    )
    words = Words("experts-picture", "Tokens that reached the experts of each block", text)
    picture = plots_run.experts_picture(words, list(counts.values()))
    return Section("experts", "Calibration of experts", (text,), picture, (table,))


def _spread_of(counts: Sequence[int]) -> tuple[float, ...]:
    return min(counts), median(counts), max(counts), sum(not tokens for tokens in counts)
