"""The text that models are measured on, as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.local import SUFFIXES, read_path
from auto_round.calibration.records import samples_of
from auto_round.errors import ConfigError, MissingError

PLAIN_SUFFIXES = (".txt", ".raw", ".md")
"""Files that are one text; `.raw` is WikiText's."""
BETWEEN = "\n\n"
"""What stands between the texts of a file of records."""
_CHARACTERS = 8
"""Characters of text that are read for each token at first: more are if the tokens do not suffice."""


def check_text(path: Path) -> None:
    """Refuse a text that cannot be read, before anything else is done.

    Raises:
        ConfigError: it is not there, is empty, or is of an unknown kind.
    """
    known = (*PLAIN_SUFFIXES, *(s for s in SUFFIXES if s not in PLAIN_SUFFIXES))
    if not path.is_file():
        raise MissingError(f"text {path}: no such file; expected one ending in {', '.join(known)}")
    if path.suffix.lower() not in known:
        raise ConfigError(f"text {path}: cannot read {path.suffix or 'this'}; expected {', '.join(known)}")
    if not path.stat().st_size:
        raise ConfigError(f"text {path}: the file is empty")


def token_rows(path: Path, tokenizer: Any, tokens: int, length: int, bos: int | None = None) -> Tensor:
    """The beginning of a text, cut into rows.

    Args:
        path: a file that `check_text` admits.
        tokenizer: of Transformers, or a callable like it; adds no special tokens.
        tokens: at most so many tokens of the text.
        length: tokens of a row.
        bos: token that is put before each row's own, which are one fewer then.

    Returns:
        `[rows, length]` int64.

    Raises:
        ConfigError: the text does not fill one row, or cannot be read.
    """
    own = length - (bos is not None)
    if own < 2:
        raise ConfigError(f"rows of {length} tokens predict nothing: give a larger --seqlen")
    ids = _ids(path, tokenizer, tokens)
    rows = ids[: len(ids) // own * own].view(-1, own)
    if not len(rows):
        raise ConfigError(
            f"text {path} gives {len(ids)} tokens, less than one row of {length}: give a longer text, more "
            "--tokens or a smaller --seqlen"
        )
    if bos is None:
        return rows
    return torch.cat([torch.full((len(rows), 1), bos, dtype=rows.dtype, device=rows.device), rows], dim=1)


def _ids(path: Path, tokenizer: Any, tokens: int) -> Tensor:
    """At most `tokens` ids: tokenized from as much of the text as that needs."""
    most = tokens * _CHARACTERS
    while True:
        text = _beginning(path, most)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens or len(text) < most:
            return torch.tensor(ids[:tokens], dtype=torch.int64, device="cpu")
        most *= 2


def _beginning(path: Path, most: int) -> str:
    """At most `most` characters."""
    if path.suffix.lower() in PLAIN_SUFFIXES:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                return file.read(most)
        except UnicodeDecodeError as error:
            raise ConfigError(f"text {path}: not UTF-8 text at byte {error.start}") from error
    found: list[str] = []
    count = 0
    for text in _texts(path):
        found.append(text)
        count += len(text) + len(BETWEEN)
        if count >= most:
            break
    return BETWEEN.join(found)[:most]


def _texts(path: Path) -> Iterator[str]:
    for number, record in enumerate(read_path(path, ()), 1):
        for sample in samples_of(record, (), f"text {path}, record {number}"):
            if not isinstance(sample, str):
                raise ConfigError(
                    f"text {path}, record {number}: expected text, found a {type(sample).__name__.lower()}"
                )
            yield sample
