"""The tables of docs/models.md, what became of tiny models: python tests/sweep/table.py [NAME ...]."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from auto_round.models.auto_classes import auto_class_name
from sweep.configurations import family_config, known_families
from sweep.multimodal import FAMILIES, image_rows, known_models, model_config
from sweep.outcome import Outcome, rows, save_config, sweep

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RUN: Mapping[str, Any] = {"iters": 2, "amp": False}
"""Blocks run in float32, on every processor: in bfloat16 two ways to add the same numbers, experts one by one
or together, say, differ by more than a small error of what was written."""
SMALLEST_KL = 1e-6
"""Divergence below which predictions count as equal: sums in another order."""
TEXT_HEAD = ("family", "blocks", "tuned", "rounded plainly, where it is not tuned")
IMAGE_HEAD = ("model", "class", "text", "images", "images and encoder")
_IMAGE_RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"images": True},
    {"images": True, "quant_nontext_module": True},
)


def shown(outcome: Outcome) -> str:
    """Matrices that were packed and how far the reloaded folder is off, or why it was refused."""
    if outcome.refused:
        reasons = [line for line in outcome.refused.splitlines() if line.startswith("  - ")]
        reason = (reasons or [outcome.refused])[0].removeprefix("  - models: ").partition(" (use")[0]
        return f"refused: {reason}"
    found = outcome.verified or {}
    if "skipped" in found:
        return f"{outcome.packed}, not loaded: {found['skipped']}"
    silent = f", no text: {why}" if (why := found.get("no_sample")) else ""
    if "tokens" in found:
        return f"{outcome.packed}, loads"
    kl = abs(float(found.get("kl", float("nan"))))
    return f"{outcome.packed}, {'equal' if kl <= SMALLEST_KL else f'KL {kl:.0e}'}{silent}"


def text_row(name: str) -> str:
    """What became of one family that reads text."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_config(family_config(name), Path(place) / "model")
        tuned = sweep(folder, name, "auto_round", "tuned", Path(place) / "tuned", **RUN)
        cells = [shown(tuned), ""]
        if tuned.refused:
            cells[1] = shown(sweep(folder, name, "auto_round", "plain", Path(place) / "plain"))
    return f"| {name} | {blocks_of(name)} | {' | '.join(cells)} |"


def blocks_of(name: str) -> str:
    """Kinds of blocks of a family, as its modules show them."""
    import torch
    from torch import nn

    from auto_round.models.roles import find_blocks
    from auto_round.models.skeleton import build_skeleton

    model = build_skeleton(family_config(name), torch.float32)
    inside = [m for path in find_blocks(model) for m in model.get_submodule(path).modules()]
    names = {type(m).__name__ for m in inside}
    attends = any("Attention" in each and not each.startswith("Rwkv") for each in names)
    recurs = any(isinstance(m, nn.Conv1d) for m in inside) or not attends
    kinds = ["hybrid" if attends and recurs else "attention" if attends else "recurrent"]
    return ", ".join([*kinds, *(["experts"] if any("Expert" in each for each in names) else [])])


def image_row(name: str) -> str:
    """What became of one model with images in each of the runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_config(model_config(name), Path(place) / "model")
        cells = []
        for number, how in enumerate(_IMAGE_RUNS):
            options = dict(how)
            pictured = options.pop("images", False)
            if pictured and FAMILIES[name].image is None:
                cells.append("not tried")
                continue
            data = [*image_rows(name), *rows()[:6]] if pictured else None
            out = Path(place) / str(number)
            cells.append(shown(sweep(folder, name, "auto_round", "tuned", out, data, **RUN, **options)))
    kind = auto_class_name(model_config(name)).removeprefix("AutoModelFor")
    return f"| {name} | {kind} | {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the page.

    Attributes:
        mark: name between the page's comments.
        head: its columns.
        names: what has a row.
        row: makes the row of a name.
    """

    mark: str
    head: tuple[str, ...]
    names: Any
    row: Any

    @property
    def edges(self) -> tuple[str, str]:
        """Comments in front of and behind the table."""
        return f"<!-- {self.mark} -->\n", f"<!-- end of {self.mark} -->\n"

    def read(self) -> dict[str, str]:
        """Rows of the page as it is, by name."""
        begin, end = self.edges
        body = PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
        return {line.split("|")[1].strip(): line for line in body.splitlines()[2:]}

    def write(self, found: Mapping[str, str]) -> None:
        """Put rows into the page."""
        begin, end = self.edges
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        lines = [f"| {' | '.join(self.head)} |", f"|{'---|' * len(self.head)}"]
        lines += [found[name] for name in sorted(found)]
        PAGE.write_text("\n".join([before + begin + lines[0], *lines[1:], end + after]), encoding="utf-8")


TABLES = (
    Table("families", TEXT_HEAD, known_families, text_row),
    Table("models with images", IMAGE_HEAD, known_models, image_row),
)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for table in TABLES:
        for name in table.names():
            if not wanted or name in wanted:
                table.write({**table.read(), name: table.row(name)})
