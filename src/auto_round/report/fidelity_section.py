"""How far folders are from their originals on a text: part of the page of one run, and of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from auto_round.report.draw import Words
from auto_round.report.fidelity import LARGEST, QUANTILES, ConfidenceInterval, Fidelity
from auto_round.report.plots_quality import QuantileBand, quantiles_picture
from auto_round.report.section import Section
from auto_round.report.table import NONE, Cell, Table, number, share


def fidelity_section(found: Fidelity) -> Section:
    """The part of a run's page."""
    kl, (before, after) = found.kl, found.perplexities
    text = (
        f"{found.positions:,} predictions of {found.text}: mean KL {kl['mean'].value:.4g} nats per token, "
        f"a tenth of them above {kl['p90'].value:.3g}, a thousandth above {kl['p99_9'].value:.3g}. "
        f"Perplexity {before:.4g} became {after:.4g}."
    )
    rows = [
        [words, *_cells(found.kl[name]), *_cells(found.reverse[name])] for name, words in QUANTILES.items()
    ]
    rows.append([LARGEST, number(found.largest[0]), NONE, NONE, number(found.largest[1]), NONE, NONE])
    columns = ("predictions", "KL", "low", "high", "KL reversed", "low", "high")
    others: list[list[Cell]] = [
        ["ratio of perplexities", *_cells(found.ratio)],
        ["same top token", *map(share, (found.same_top.value, found.same_top.low, found.same_top.high))],
        ["RMS difference of probabilities", *map(share, (found.rms.value, found.rms.low, found.rms.high))],
        ["KL of the original in another dtype", number(found.floor), NONE, NONE],
    ]
    tables = (
        Table("Divergence on a text", columns, rows),
        Table("Agreement on a text", ("what", "value", "low", "high"), others),
    )
    words = Words("fidelity-picture", "Divergence by share of the predictions", text)
    picture = quantiles_picture(words, {"": _band(found)}, found.floor)
    return Section("fidelity", "Fidelity on a text", (text,), picture, tables)


def fidelity_of_runs(runs: Mapping[str, Fidelity]) -> Section:
    """The part of a page of several runs.

    Args:
        runs: label -> what was measured.
    """
    several = len({found.measured_on for found in runs.values()}) > 1
    best = min(runs, key=lambda label: runs[label].kl["mean"].value)
    text = (
        f"Of {len(runs)} runs {best} is nearest to its original: mean KL {runs[best].kl['mean'].value:.4g}."
    )
    if several:
        text += " They were measured on different texts: small differences between them say nothing."
    table = Table(
        "Divergence on a text",
        ("run", *QUANTILES.values(), LARGEST, "ratio of perplexities", "same top token"),
        [
            [
                label,
                *(number(found.kl[name].value) for name in QUANTILES),
                number(found.largest[0]),
                number(found.ratio.value),
                share(found.same_top.value),
            ]
            for label, found in runs.items()
        ],
    )
    floors = [found.floor for found in runs.values() if found.floor is not None]
    words = Words("fidelity-picture", "Divergence by share of the predictions", text)
    bands = {label: _band(found) for label, found in runs.items()}
    picture = quantiles_picture(words, bands, min(floors) if floors else None)
    return Section("fidelity", "Fidelity on a text", (text,), picture, (table,))


def _band(found: Fidelity) -> QuantileBand:
    shares = [name for name in QUANTILES if name != "mean"]
    names = [QUANTILES[name] for name in shares]
    return QuantileBand(
        [*names, LARGEST],
        [*(found.kl[name].value for name in shares), found.largest[0]],
        [*(found.kl[name].low for name in shares), found.largest[0]],
        [*(found.kl[name].high for name in shares), found.largest[0]],
    )


def _cells(found: ConfidenceInterval) -> Iterator[Cell]:
    yield from (number(found.value), number(found.low), number(found.high))
