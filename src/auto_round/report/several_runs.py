"""The page that compares runs: one frontier of size and quality, one table, their losses and divergences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from auto_round.report import plots_quality
from auto_round.report.draw import Words
from auto_round.report.fidelity_section import fidelity_of_runs
from auto_round.report.one_run import spread_table
from auto_round.report.plots_quality import Point
from auto_round.report.run import Run
from auto_round.report.section import Page, Section
from auto_round.report.table import Cell, Table, nbytes, number, seconds, share


def page_of_all(runs: Sequence[Run]) -> Page:
    """What the records of several runs say beside each other.

    Args:
        runs: at least two, with labels of their own.
    """
    models = list(dict.fromkeys(run.model for run in runs))
    return Page(
        title=f"{len(runs)} runs of {', '.join(models)}",
        subtitle=", ".join(run.label for run in runs),
        notices=tuple(_notices(runs)),
        sections=tuple(_sections(runs)),
    )


def _notices(runs: Sequence[Run]) -> Iterator[str]:
    measured = [run for run in runs if run.held_out is not None]
    if len({run.model for run in runs}) > 1:
        yield "The runs are of different models: distances from the original are of each from its own."
    if len({_rows(run) for run in measured}) > 1:
        yield "Quality was measured on different rows: small differences between the runs say nothing."
    if without := [run.label for run in runs if run.held_out is None]:
        yield f"Quality was not measured in {', '.join(without)}."


def _rows(run: Run) -> tuple[str, int]:
    data = run.calibration
    return ("", 0) if data is None else (data.fingerprint, data.rows_tuned)


def _sections(runs: Sequence[Run]) -> Iterator[Section]:
    if any(run.held_out is not None and math.isfinite(run.held_out.kl) for run in runs):
        yield _frontier(runs)
    spreads = {
        run.label: run.held_out.kl_histogram
        for run in runs
        if run.held_out is not None and run.held_out.kl_histogram is not None
    }
    alike = {(s.first_power, s.bins_per_decade, len(s.positions)) for s in spreads.values()}
    if spreads and len(alike) == 1:
        text = f"How far single predictions of {len(spreads)} runs are from the original's."
        words = Words("spread-picture", "Divergence of single predictions", text)
        picture = plots_quality.spread_picture(words, spreads)
        yield Section(
            "spread", "Divergence of single predictions", (text,), picture, (spread_table(spreads),)
        )
    if measured := {run.label: run.fidelity for run in runs if run.fidelity is not None}:
        yield fidelity_of_runs(measured)
    tuned = {run.label: run.tuned for run in runs if run.tuned}
    if tuned:
        text = f"Loss that was kept in each block of {len(tuned)} runs."
        picture = plots_quality.losses_of_runs(Words("losses-picture", "Loss after tuning", text), tuned)
        longest = max(map(len, tuned.values()))
        rows: list[list[Cell]] = [
            [str(i), *(number(units[i].loss) if i < len(units) else "-" for units in tuned.values())]
            for i in range(longest)
        ]
        yield Section(
            "losses", "Loss after tuning", (text,), picture, (Table("Losses", ("block", *tuned), rows),)
        )
    yield Section("runs", "All runs", tables=(_table(runs),), wide=True)


def _frontier(runs: Sequence[Run]) -> Section:
    points = [
        Point(run.label, str(i), run.nbytes, run.held_out.kl)
        for i, run in enumerate(runs, 1)
        if run.held_out is not None and math.isfinite(run.held_out.kl)
    ]
    best = plots_quality.frontier_of(points)
    text = (
        f"{len(best)} of {len(points)} runs are beaten by no other in both size and distance: "
        f"{', '.join(point.label for point in best)}. Numbers are those of the table."
    )
    words = Words("frontier-picture", "Size and distance from the original", text)
    picture = plots_quality.frontier_picture(words, points)
    rows: list[list[Cell]] = [
        [f"{p.mark} {p.label}", nbytes(p.nbytes), number(p.kl), "yes" if p in best else "no"] for p in points
    ]
    table = Table("Size and quality", ("run", "size", "KL", "on the frontier"), rows)
    return Section("frontier", "Size and quality", (text,), picture, (table,))


_COLUMNS = (
    *("run", "model", "scheme", "method", "size", "bits", "perplexity before", "perplexity", "KL"),
    *("same top token", "time", "peak memory"),
)


def _table(runs: Sequence[Run]) -> Table:
    return Table("Runs", _COLUMNS, [_row(i, run) for i, run in enumerate(runs, 1)])


def _row(place: int, run: Run) -> list[Cell]:
    row: list[Cell] = [
        f"{place} {run.label}",
        run.model,
        run.recipe,
        run.method,
        nbytes(run.nbytes),
        number(run.bits_per_quantized_weight),
    ]
    held, record = run.held_out, run.record
    if held is None:
        row += ["-"] * 4
    else:
        figures = (held.perplexity_before, held.perplexity_after, held.kl)
        row += [*(number(figure) for figure in figures), share(held.same_top_token)]
    row += ["-", "-"] if record is None else [seconds(record.seconds), nbytes(record.peak_bytes)]
    return row
