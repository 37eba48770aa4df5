"""Where calibration records come from: a name, a path, or the user's own objects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from auto_round.calibration.grammar import DatasetItem, parse_dataset
from auto_round.calibration.hub import Records, read_hub, read_llava
from auto_round.calibration.local import SUFFIXES, check_path, read_path, without_splits
from auto_round.calibration.pictures import ImageReader
from auto_round.calibration.python_docs import PythonDocs
from auto_round.calibration.registry import (
    LATER_DATASETS,
    PYTHON_DOCS,
    SELF,
    HubDataset,
    built_in,
    find_dataset,
    known_names,
    llava_file,
)
from auto_round.calibration.self_text import SelfText
from auto_round.errors import ConfigError, nearest
from auto_round.models.hub import Platform


@dataclass(frozen=True, slots=True)
class RecordSource:
    """Records and how they are meant to be read.

    Attributes:
        name: for messages.
        records: a sequence can be read in any order; any other iterable is read from its begin.
        fields: columns that hold the text; empty: the usual ones.
        concat: whether its records are joined and cut unless the user says otherwise.
        keep_order: take the records in their own order instead of a random one.
        folder: folder of its file; None where it has none.
        dear: a record costs much, so that none is read that is not needed.
    """

    name: str
    records: Records
    fields: tuple[str, ...] = ()
    concat: bool = False
    keep_order: bool = False
    folder: Path | None = None
    dear: bool = False


@dataclass(frozen=True, slots=True)
class OfModel:
    """What only the model at hand makes rows of.

    Attributes:
        images: makes rows of text with images; None where the model reads none.
        own_text: writes text; None where there is no model.
        prefix: what the names of the options begin with that say how many rows, and how long.
    """

    images: ImageReader | None = None
    own_text: SelfText | None = None
    prefix: str = ""


NOTHING = OfModel()
"""There is no model."""


def open_item(
    item: DatasetItem, platform: Platform = "hf", own_text: SelfText | None = None, wanted: int = 0
) -> RecordSource:
    """Return the source that one item of a data set specification names.

    Looked up in this order: the built-in texts, registered names, paths on this machine, `owner/name` of the
    hub.

    Args:
        item: the parsed item.
        platform: hub to ask.
        own_text: writes the model's own text.
        wanted: rows that will be asked for, as far as that is known.

    Raises:
        ConfigError: there is no such data set, or it cannot be read.
    """
    name = item.name
    if (own := built_in(name)) is not None:
        without_splits(own, item.splits)
    if own == PYTHON_DOCS:
        return RecordSource(PYTHON_DOCS, PythonDocs(), concat=True)
    if own == SELF:
        if own_text is None:
            raise ConfigError(f'data set "{SELF}" is text that a model writes, and there is no model here')
        return RecordSource(SELF, own_text.records(item, wanted), keep_order=True, dear=True)
    row = find_dataset(name)
    if row is not None:
        return RecordSource(name, read_hub(row, item.splits, platform), row.fields)
    path = Path(name).expanduser()
    if (file := llava_file(name)) is not None and not path.exists():
        return RecordSource(name, read_llava(file))
    if _is_path(name, path):
        records, folder = read_path(path, item.splits), path if path.is_dir() else path.parent
        return RecordSource(path.name, records, concat=path.suffix.lower() == ".txt", folder=folder)
    _refuse_no_hub_name(name)
    return RecordSource(name, read_hub(HubDataset((name,), fields=()), item.splits, platform))


def check_named(dataset: str) -> None:
    """Refuse a specification that cannot be right, without reading a file or asking a hub.

    Args:
        dataset: the specification, see `grammar`.

    Raises:
        ConfigError: it cannot be read, or names a file that is not there or no data set.
    """
    for item in parse_dataset(dataset):
        if built_in(item.name) or find_dataset(item.name):
            continue
        path = Path(item.name).expanduser()
        if _is_path(item.name, path):
            check_path(path)
        elif llava_file(item.name) is None:
            _refuse_no_hub_name(item.name)


def _is_path(name: str, path: Path) -> bool:
    return path.exists() or path.suffix.lower() in SUFFIXES or name.startswith((".", "~", "/"))


def _refuse_no_hub_name(name: str) -> None:
    if name in LATER_DATASETS:
        raise ConfigError(
            f'data set "{name}" holds captions or sound, which calibration cannot use yet; use one with text'
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise ConfigError(
            f'data set "{name}" is not a registered name ({nearest(name, known_names())}), not a path that '
            f"exists (files end in {', '.join(SUFFIXES)}) and not an owner/name of the hub; commas "
            "divide data sets, and colons their options: a file that has them in its name stands in quotes "
            """inside the text ('"a, b.txt"')"""
        )


def own_source(records: Iterable[object]) -> RecordSource:
    """Return the source of the user's own records, taken in their order.

    Args:
        records: list of texts, of token ids, of mappings (`input_ids` with `attention_mask`, or text), of
            `BatchEncoding`; a `DataLoader` of these; a tensor `[rows, tokens]`.
    """
    name = "the given data"
    kept: Records = records if isinstance(records, Sequence) else iter(records)
    return RecordSource(name, kept, keep_order=True)
