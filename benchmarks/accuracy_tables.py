"""What the lines of the accuracy benchmark say: two tables, and a picture of KL against time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEER, DEFAULT, ROUNDED = "peer", "default", "opt_rtn"


def table(lines: list[dict[str, Any]]) -> str:
    """The results in Markdown, one row a run."""
    texts = sorted({text for line in lines for text in line["kl"]})
    head = ["model", "scheme", "seed", "package", "version"]
    head += [f"{kind} {t}" for kind in ("KL", "same top") for t in texts]
    head += ["wall s", "cpu s", "peak MiB", "sink error", "other error", "attention to sink"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        run = line["run"]
        rows.append(
            [
                *(str(run[name]) for name in ("model", "scheme", "seed", "package")),
                line["version"],
                *(str(line[kind].get(text, "")) for kind in ("kl", "same_top") for text in texts),
                *(str(line[n]) for n in ("wall_s", "cpu_s", "peak_mib", "sink_error", "other_error")),
                f"{line['sink_attention_original']} -> {line['sink_attention']}",
            ]
        )
    return markdown(rows)


def against_peer(lines: list[dict[str, Any]]) -> str:
    """Each run of ours over the other package's default with the same rows."""
    rows = [["model", "scheme", "seed", "recipe", "against", "KL", "processor time", "memory"], ["---"] * 8]
    for line in lines:
        for pair in [other for other in lines if _paired(line, other)]:
            shared = [text for text in line["kl"] if text in pair["kl"]]
            if not shared:
                continue
            kl = math.exp(sum(math.log(line["kl"][t] / pair["kl"][t]) for t in shared) / len(shared))
            costs = [f"{line[name] / pair[name]:.2f}" for name in ("cpu_s", "peak_mib")]
            who = [str(line["run"][name]) for name in ("model", "scheme", "seed", "package")]
            against = f"{pair['version']}, {pair['run']['iters']} steps"
            rows.append([*who, against, f"**{kl:.3f}** ({', '.join(shared)})", *costs])
    return markdown(rows)


def _paired(line: dict[str, Any], other: dict[str, Any]) -> bool:
    ours, peer = line["run"], other["run"]
    same = ("model", "scheme", "seed", "dataset", "nsamples", "seqlen")
    right = peer["package"] == f"{PEER} {DEFAULT}" and not ours["package"].startswith(PEER)
    return right and all(ours[n] == peer[n] for n in same) and line["measured"] == other["measured"]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the second row is the line below the head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(
    path: Path, lines: Sequence[dict[str, Any]], runs: Sequence[Mapping[str, Any]], measured: Sequence[int]
) -> None:
    """Draw the geometric mean over texts of KL against processor time, one panel a number of bits.

    Args:
        path: SVG or PNG.
        lines: results; those with fewer texts than others are left out.
        runs: which of them are drawn. Of several lines of one the last counts.
        measured: tokens of a text and of a row.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [
        [line for line in lines if line["measured"] == list(measured) and line["run"] == run][-1:]
        for run in runs
    ]
    shown = list(itertools.chain(*shown))
    texts = set().union(*(line["kl"] for line in shown))
    shown = [line for line in shown if line["kl"].keys() == texts]
    panels: dict[str, list[tuple[float, float, str]]] = {}
    for line in sorted(shown, key=lambda line: line["cpu_s"]):
        scheme, _, rounded = line["run"]["scheme"].partition(":")
        kl = math.exp(sum(map(math.log, line["kl"].values())) / len(texts))
        label = ROUNDED if rounded else line["run"]["package"]
        panels.setdefault(scheme, []).append((line["cpu_s"], kl, label))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "accuracy"}):
        figure = Figure(figsize=(3.4 * len(panels), 2.9), layout="constrained")
        for axes, scheme in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], sorted(panels), strict=True
        ):
            _panel(axes, panels[scheme])
            axes.set(title=scheme, xlabel="processor seconds")
        figure.axes[0].set_ylabel("KL, nats per token")
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Points with their names, by turns above and below."""
    for index, (seconds, kl, name) in enumerate(points):
        axes.scatter(seconds, kl, color="#a54d0a" if name.startswith(PEER) else "#2563a8", s=24)
        place = (-6, -14 if index % 2 else 7)
        axes.annotate(name, (seconds, kl), place, textcoords="offset points", fontsize=8)
    most = [max(point[axis] for point in points) for axis in (0, 1)]
    axes.set(xlim=(0, 1.35 * most[0]), ylim=(0, 1.2 * most[1]))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
