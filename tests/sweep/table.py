"""Writes the table of docs/models.md: python tests/sweep/table.py [NAME ...]."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from auto_round.models.auto_classes import auto_class_name
from sweep.multimodal import FAMILIES, image_rows, known_models, model_config
from sweep.outcome import Outcome, rows, save_config, sweep

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
RUNS: dict[str, dict[str, Any]] = {
    "text": {},
    "images": {"images": True},
    "images and encoder": {"images": True, "quant_nontext_module": True},
}


def shown(outcome: Outcome) -> str:
    """Matrices that were packed and how far the reloaded folder is off, or why it was refused."""
    if outcome.refused:
        reasons = [line for line in outcome.refused.splitlines() if line.startswith("  - ")]
        return (
            "refused: " + (reasons or [outcome.refused])[0].removeprefix("  - models: ").partition(" (use")[0]
        )
    kl = abs(float((outcome.verified or {}).get("kl", float("nan"))))
    return f"{outcome.packed}, KL {kl:.0e}" if kl else f"{outcome.packed}, equal"


def row(name: str) -> str:
    """What became of one model in each of the runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = save_config(model_config(name), Path(place) / "model")
        cells = []
        for number, how in enumerate(RUNS.values()):
            options = dict(how)
            pictured = options.pop("images", False)
            if pictured and FAMILIES[name].image is None:
                cells.append("not tried")
                continue
            data = [*image_rows(name), *rows()[:6]] if pictured else None
            out = Path(place) / str(number)
            cells.append(shown(sweep(folder, name, "auto_round", "tuned", out, data, **options)))
    kind = auto_class_name(model_config(name)).removeprefix("AutoModelFor")
    return f"| {name} | {kind} | {' | '.join(cells)} |"


def known_rows(table: str) -> dict[str, str]:
    """Rows of the page as it is, by name."""
    return {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    table = known_rows(old)
    for name in sys.argv[1:] or known_models():
        table[name] = row(name)
        body = "\n".join(table[name] for name in sorted(table))
        head = f"| model | class | {' | '.join(RUNS)} |\n|{'---|' * (2 + len(RUNS))}\n"
        PAGE.write_text(f"{before}{BEGIN}{head}{body}\n{END}{after}", encoding="utf-8")
