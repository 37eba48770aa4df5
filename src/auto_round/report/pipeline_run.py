"""The page of a run over a pipeline: pictures side by side, plan, losses, error of each denoising step."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from auto_round.report import plots_run
from auto_round.report.draw import Picture, Words
from auto_round.report.run import PlanLine, UnitRecord
from auto_round.report.section import Page, Section, Tile
from auto_round.report.table import Table, number, share
from auto_round.units import shrinkage, size

PIPELINE: Final = "pipeline"
"""Key of `report.json` that runs over pipelines have: the class of the pipeline."""


def page_of_pipeline(report: Mapping[str, Any], folder: Path) -> Page:
    """Everything that the report of a run over a pipeline says.

    Args:
        report: its `report.json`.
        folder: where it lies, with the pictures beside it or in the folder of a format.
    """
    return Page(
        title=f"{report['model']}, {report['scheme']}",
        subtitle=f"{report[PIPELINE]}; {report['method']}; written as {', '.join(report['formats'])}",
        tiles=tuple(_tiles(report)),
        notices=tuple(_notices(report)),
        sections=tuple(_sections(report, folder)),
    )


def _tiles(report: Mapping[str, Any]) -> Iterator[Tile]:
    for name, part in report["components"].items():
        before, after = part["bytes_before"], next(iter(part["bytes_after"].values()))
        yield Tile(f"Size of {name}", size(after), f"from {size(before)}, {shrinkage(before, after)}")
        if (held := part.get("held_out")) is not None:
            text = f"of the square of what it predicts, {held['rows']} rows of held-out captions"
            yield Tile(f"Error of {name}", share(held["relative_error"]), text)
    if (shown := report.get("pictures")) is not None:
        yield Tile("PSNR", number(shown["psnr"]), f"dB, mean of {shown['pictures']} pictures")
        yield Tile("SSIM", number(shown["ssim"]), f"latents {shown['latent_error']:.3g} off")
        for name, scores in shown.get("metrics", {}).items():
            yield Tile(name, number(scores["quantized"]), f"original: {scores['original']:.4g}")


def _notices(report: Mapping[str, Any]) -> Iterator[str]:
    if "pictures" not in report:
        yield "No pictures were drawn: --prompt or --prompt_file compares some."
    if all("held_out" not in part for part in report["components"].values()):
        yield "The error of predictions was not measured: the run had no captions."


def _sections(report: Mapping[str, Any], folder: Path) -> Iterator[Section]:
    if (shown := report.get("pictures")) is not None:
        yield _pictures(shown, folder)
    for name, part in report["components"].items():
        yield _plan(name, part)
        if (losses := _losses(name, part)) is not None:
            yield losses
        if (held := part.get("held_out")) is not None:
            rows = [[step, number(error)] for step, error in held["by_step"].items()]
            table = Table("Error by denoising step", ("step", "squared error over square"), rows)
            yield Section(f"steps-{name}", f"Steps of {name}", tables=(table,))


def _pictures(shown: Mapping[str, Any], folder: Path) -> Section:
    """The sheet, inside the page."""
    columns = ("caption", "PSNR, dB", "SSIM")
    rows = [[each["caption"], number(each["psnr"]), number(each["ssim"])] for each in shown["each"]]
    words = ("Original, result, and their difference, brightened; from the same captions and noise.",)
    places = (base / shown["sheet"] for base in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())))
    sheet = next((place for place in places if place.is_file()), None)
    picture = None
    if sheet is not None:
        data = base64.b64encode(sheet.read_bytes()).decode()
        text = f"{len(rows)} captions, each drawn by the original and by the result"
        tag = f'<img alt="{text}" style="max-width:100%" src="data:image/png;base64,{data}">'
        picture = Picture(tag, "Pictures side by side", text)
    return Section("pictures", "Pictures", words, picture, (Table("Pictures", columns, rows),), wide=True)


def _plan(name: str, part: Mapping[str, Any]) -> Section:
    lines = [PlanLine(**line) for line in part["plan"]]
    blocks = 1 + max((last for line in lines for _, last in line.blocks), default=0)
    key = f"plan-{name}"
    text = f"{len(lines)} kinds of layers in {blocks} blocks"
    picture = plots_run.plan_picture(Words(f"{key}-picture", "Bits of each layer", text), lines, blocks)
    columns = ("layer", "scheme", "stored bits", "matrices a block", "weights a block", "because")
    rows = [
        [
            line.kind,
            line.scheme,
            number(line.stored_bits),
            number(line.layers),
            number(line.weights),
            line.reason,
        ]
        for line in lines
    ]
    return Section(key, f"Plan of {name}", (), picture, (Table("Plan", columns, rows),))


def _losses(name: str, part: Mapping[str, Any]) -> Section | None:
    known = UnitRecord.__dataclass_fields__
    units = [UnitRecord(**{k: v for k, v in entry.items() if k in known}) for entry in part["blocks"]]
    tuned = [unit for unit in units if unit.loss is not None]
    if not tuned:
        return None
    key = f"losses-{name}"
    words = Words(f"{key}-picture", "Loss of each block", "before and after tuning, on held-out captions")
    rows = [[u.unit, number(u.initial_loss), number(u.loss), number(u.best_step)] for u in tuned]
    table = Table("Losses", ("block", "rounded", "tuned", "step kept"), rows)
    return Section(key, f"Blocks of {name}", (), plots_run.losses_picture(words, tuned), (table,))
