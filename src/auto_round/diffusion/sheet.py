"""Pictures as files, and a sheet that shows them side by side: original, quantized, difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import writing
from auto_round.errors import ConfigError

MOST_ROWS = 16
"""Pictures on a sheet."""
TIMES = 4
"""By how much differences are brightened."""
_LEAST, _GAP, _LINE = 96, 8, 14


def require_pillow() -> Any:
    """The package that writes pictures.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("pictures need a package that is missing: pip install pillow") from error
    return Image


def write_pictures(folder: Path, name: str, pictures: Tensor) -> None:
    """Write pictures `[n, height, width, 3]` with numbers from 0 to 1 as PNG files."""
    for i, picture in enumerate(pictures):
        _save(_image(picture), folder / f"{i:03d}-{name}.png")


def write_sheet(path: Path, captions: Sequence[str], before: Tensor, after: Tensor) -> None:
    """Write the sheet: a line for each caption with three pictures.

    Args:
        path: PNG file.
        captions: of the pictures.
        before: pictures of the original, `[n, height, width, 3]` from 0 to 1.
        after: pictures of the result.
    """
    from PIL import ImageDraw

    count = min(MOST_ROWS, len(captions))
    scale = max(1, -(-_LEAST // before.shape[2]))
    width, height = before.shape[2] * scale, before.shape[1] * scale
    step = height + _GAP + _LINE
    sheet = require_pillow().new("RGB", (3 * width + 4 * _GAP, _LINE + count * step + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("original", "quantized", f"difference x {TIMES}")):
        pen.text((_GAP + column * (width + _GAP), 2), title, fill="black")
    for row in range(count):
        top = _LINE + row * step
        pen.text((_GAP, top), captions[row][: (3 * width) // 6], fill="black")
        difference = (after[row] - before[row]).abs() * TIMES
        for column, picture in enumerate((before[row], after[row], difference)):
            place = (_GAP + column * (width + _GAP), top + _LINE)
            sheet.paste(_image(picture).resize((width, height), 0), place)
    _save(sheet, path)


def _image(picture: Tensor) -> Any:
    numbers = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return require_pillow().fromarray(numbers)


def _save(image: Any, path: Path) -> None:
    with writing(path):
        image.save(path, format="PNG")
