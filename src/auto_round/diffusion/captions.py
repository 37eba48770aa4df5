"""Captions: what a pipeline draws for calibration, and to compare."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from auto_round.calibration.grammar import parse_dataset
from auto_round.calibration.local import read_path
from auto_round.checkpoint.disk import atomic_write_bytes, reading, writing
from auto_round.config import CalibrationOptions, cache_folder
from auto_round.errors import ConfigError, MissingError
from auto_round.log import logger

FIELDS = ("caption", "prompt", "text")
"""Columns that hold captions, first match."""

SUFFIXES = (".tsv", ".jsonl", ".json", ".txt")

COCO = "coco2014"
COCO_ADDRESS = (
    "https://raw.githubusercontent.com/mlcommons/inference/master/text_to_image/coco2014/captions/"
    "captions_source.tsv"
)
"""Captions of COCO 2014 that MLCommons takes for its benchmark of pictures from text."""


def read_captions(dataset: str | Iterable[Any], count: int, seed: int) -> list[str]:
    """Captions to calibrate on, in an order that `seed` decides; the user's own records keep theirs.

    Args:
        dataset: a file, `coco2014`, or records from Python: texts, or mappings with a caption.
        count: most captions.
        seed: of their order.

    Raises:
        ConfigError: no such file, or no captions in it.
    """
    if not isinstance(dataset, str | Path):
        return _of_records(dataset, "the given data")[:count]
    captions = of_file(_place(str(dataset)))
    random.Random(seed).shuffle(captions)
    if len(captions) < count:
        logger.info("%s holds %d captions, %d were asked for", dataset, len(captions), count)
    return captions[:count]


def check_captions(dataset: str) -> None:
    """Refuse a data set that holds no captions, before anything is read.

    Raises:
        ConfigError: it is none, or not there.
    """
    name = named(dataset)
    if name != COCO:
        _existing(name)


def of_file(path: Path) -> list[str]:
    """All captions of a file, in its order.

    Raises:
        ConfigError: it is not there, of another kind, or holds none.
    """
    _existing(str(path))
    if path.suffix.lower() == ".tsv":
        return _of_table(path)
    if path.suffix.lower() == ".txt":
        return _of_records([line for line in _lines(path) if line.strip()], str(path))
    return _of_records(read_path(path, ()), str(path))


def named(dataset: str) -> str:
    """The data set to read: captions of COCO where nobody named one; quotes around a path go."""
    if dataset == CalibrationOptions().dataset:
        return COCO
    if dataset[:1] not in ("'", '"') or Path(dataset).exists():
        return dataset
    return ",".join(item.name for item in parse_dataset(dataset))


def _place(dataset: str) -> Path:
    name = named(dataset)
    return _coco() if name == COCO else Path(name).expanduser()


def _existing(name: str) -> None:
    path = Path(name).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f'"{name}" is no data set of captions, which pipelines of diffusers are calibrated with: give a '
            f"file that ends in {', '.join(SUFFIXES)}, or {COCO}"
        )
    if not path.is_file():
        raise MissingError(f"captions {path}: no such file; relative paths begin at {Path.cwd()}")


def _lines(path: Path) -> list[str]:
    with reading(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"captions {path}: expected text in UTF-8 ({error})") from error


def _of_table(path: Path) -> list[str]:
    rows = csv.DictReader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    names = rows.fieldnames or ()
    column = next((name for name in FIELDS if name in names), None)
    if column is None:
        raise ConfigError(
            f"captions {path}: its first line names the columns {list(names)}; expected one of "
            f"{', '.join(FIELDS)}"
        )
    return _of_records([row[column] for row in rows if row[column]], str(path))


def _of_records(records: Iterable[Any], name: str) -> list[str]:
    if isinstance(records, Mapping) or not isinstance(records, Iterable):
        raise ConfigError(
            f"captions {name}: expected a list of captions, or of mappings with one of {', '.join(FIELDS)}, "
            f"got a {type(records).__name__}"
        )
    captions = [_caption(record, f"{name}, record {i}") for i, record in enumerate(records)]
    if not captions:
        raise ConfigError(f"captions {name}: it holds none")
    return captions


def _caption(record: Any, place: str) -> str:
    value = record
    if isinstance(record, Mapping):
        value = next((record[name] for name in FIELDS if name in record), None)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ConfigError(f"{place}: expected a caption, or a mapping with one of {', '.join(FIELDS)}")


def _coco() -> Path:
    """The captions of COCO, downloaded once.

    Raises:
        ConfigError: they are not in the cache and cannot be fetched.
    """
    from urllib.error import URLError
    from urllib.request import urlopen

    path = cache_folder() / "captions" / "coco2014.tsv"
    if path.is_file():
        return path
    try:
        with urlopen(COCO_ADDRESS, timeout=30) as answer:
            text = answer.read()
    except (URLError, OSError) as error:
        raise ConfigError(
            f"the captions of {COCO} cannot be fetched ({error}): give a file of captions with --dataset "
            f"(one that ends in {', '.join(SUFFIXES)})"
        ) from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, text)
    return path
