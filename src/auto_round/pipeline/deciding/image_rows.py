"""Rows with images: the processor that makes them, and what a model must be able to do with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from auto_round.calibration.pictures import INSTALL_IMAGES, ImageReader
from auto_round.calibration.row import CalibrationRow
from auto_round.calibration.rows import CalibrationRows
from auto_round.calibration.template import template_text
from auto_round.config.options import Options
from auto_round.config.values import folders_by_kind
from auto_round.errors import ConfigError
from auto_round.facts.model import MASK, TOKENS
from auto_round.models.source import ModelSource

IMAGES = "pixel_values"
"""What models of Transformers call the numbers of images."""
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What says which tokens stand for images: some models compute something else without it, and say nothing."""


def image_reader(options: Options, source: ModelSource, processor: Any) -> ImageReader | None:
    """What makes rows with images; None for a model that reads none.

    Args:
        options: what the user asked for.
        source: the model.
        processor: its processor, an object; None to load it when it is needed.
    """
    if IMAGES not in source.input_names:
        return None
    wanted = options.calibration
    folder = None if wanted.extra_data_dir is None else image_folder(wanted.extra_data_dir)
    load = functools.cache(_loader(options, source, processor))
    return ImageReader(load, folder, template_text(wanted.template), source.facts.image_token)


def image_folder(text: str) -> Path:
    """Folder of the images in `extra_data_dir`: a folder, or "image=FOLDER,video=FOLDER,...".

    Raises:
        ConfigError: there is no such folder.
    """
    kinds = folders_by_kind(text)
    folder = Path(kinds.get("image", "")).expanduser()
    if "image" not in kinds or not folder.is_dir():
        raise ConfigError(
            f'extra_data_dir "{text}": no folder "{folder}"; expected the folder of the images, '
            "or image=FOLDER"
        )
    return folder


def _loader(options: Options, source: ModelSource, processor: Any) -> Callable[[], Any]:
    def load() -> Any:
        from transformers import AutoImageProcessor, AutoProcessor

        if find_spec("PIL") is None:
            raise ConfigError(f"the data hold images, which need a package that is missing: {INSTALL_IMAGES}")
        trust = options.model.trust_remote_code
        where = options.model.processor or str(source.folder)
        found = processor
        try:
            if found is None:
                found = AutoProcessor.from_pretrained(where, trust_remote_code=trust)
            if options.model.image_processor is not None:
                found = copy.copy(found)
                where = options.model.image_processor
                found.image_processor = AutoImageProcessor.from_pretrained(where, trust_remote_code=trust)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise _no_processor(where, str(error).strip().split("\n", 1)[0]) from error
        if getattr(found, "image_processor", None) is None:
            raise _no_processor(where, f"there is only a {type(found).__name__}")
        return found

    return load


def _no_processor(where: str, why: str) -> ConfigError:
    return ConfigError(
        f"the data hold images, but there is no processor in {where} ({why}); name one with --processor, or "
        "copy preprocessor_config.json or processor_config.json of the original model there"
    )


def first_with_images(rows: Sequence[CalibrationRow]) -> CalibrationRow | None:
    """The first row with more than text; None where there is none."""
    return next((row for row in rows if row.beside_text), None)


def refuse_other_inputs(rows: Sequence[CalibrationRow], source: ModelSource, *, ready: bool) -> None:
    """Refuse rows with inputs that the model does not take, or without some that it computes wrongly without.

    Args:
        rows: all rows.
        source: the model.
        ready: rows may have been made elsewhere than by the model's processor.

    Raises:
        ConfigError: names the row and the inputs.
    """
    wanted = TOKEN_TYPES if ready else TOKEN_TYPES[:1]
    for number, row in enumerate(rows):
        if not row.beside_text:
            continue
        if unknown := sorted(row.beside_text - source.input_names):
            raise ConfigError(
                f"calibration row {number} holds {', '.join(unknown)}, which this model does not take; "
                f"it takes {', '.join(sorted(source.input_names & _INTERESTING) or [TOKENS])}"
            )
        lacking = [name for name in wanted if name in source.input_names and name not in row.inputs]
        if IMAGES in row.inputs and lacking:
            raise ConfigError(
                f"calibration row {number} holds images and no {lacking[0]}, without which this model takes "
                "them for text: give all that its processor returns"
            )


_INTERESTING = frozenset({TOKENS, MASK, IMAGES, "input_features", *TOKEN_TYPES})


def with_each_kind_held_out(rows: CalibrationRows, tuned: int) -> CalibrationRows:
    """The same rows in an order in which those held out have some with images and some without, if any do."""
    order = list(rows.rows)
    for pictured in (True, False):
        held = [i for i in range(tuned, len(order)) if bool(order[i].beside_text) is pictured]
        spare = [i for i in range(tuned) if bool(order[i].beside_text) is pictured]
        if not held and len(spare) > 1 and len(order) - tuned > 1:
            place = tuned if pictured else len(order) - 1
            order[spare[-1]], order[place] = order[place], order[spare[-1]]
    return replace(rows, rows=tuple(order))
