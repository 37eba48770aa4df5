"""The data set `self`: rows that the model writes, kept in a file so that all its runs have the same.

A row is a line of the file: its text, for people, and its tokens, which are what is used. What was written is
never written again, so a file grows when more rows are asked for.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.grammar import DatasetItem
from auto_round.calibration.self_script import Script, script_of
from auto_round.calibration.self_writing import TEMPERATURE, draws_of, write_rows
from auto_round.checkpoint.lock import HELD, try_lock
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.facts.model import MASK, TOKENS
from auto_round.facts.tensor import dtype_name
from auto_round.log import logger
from auto_round.models.fingerprint import model_fingerprint
from auto_round.models.roles import text_model
from auto_round.models.source import ModelSource
from auto_round.units import duration

AT_ONCE = 32
"""Most rows that are written at once: a processor reads the weights as often for one row as for many."""
_TOLD_EVERY = 15.0
"""Seconds between two messages."""

Record = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SelfText:
    """Writes rows of one model, and keeps them.

    Attributes:
        source: the model.
        tokenizer: its tokenizer.
        device: where the whole model runs.
        dtype: dtype in which it runs.
        folder: where files are kept.
        seqlen: tokens of a row.
        seed: decides what is drawn.
        rows_at_once: how many rows fit into memory beside the model; refuses a model that does not fit.
    """

    source: ModelSource
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    folder: Path
    seqlen: int
    seed: int
    rows_at_once: Callable[[], int]

    def records(self, item: DatasetItem, wanted: int) -> Iterator[Record]:
        """Rows without end: those that are kept, then further ones as they are asked for.

        Args:
            item: says what is written; its `num` is not looked at.
            wanted: rows that will be asked for, as far as that is known.

        Raises:
            ConfigError: no tokenizer, or no script.
            UnsupportedError: a model that cannot write, or does not fit into memory.
        """
        script = self._script(item)
        path = self.folder / f"{self._name(item)}.jsonl"
        done = 0
        for record in _read(path):
            done += 1
            yield record
        yield from self._further(path, script, done, wanted)

    def _further(self, path: Path, script: Script, done: int, wanted: int) -> Iterator[Record]:
        at_once = self.rows_at_once()
        told = _Told(self.seqlen - len(script.opening), max(wanted - done, 0))
        logger.info(
            'data set "self": the model writes %d rows of %d tokens, %d at once, on %s in %s; kept in %s',
            told.rows,
            self.seqlen,
            at_once,
            self.device,
            dtype_name(self.dtype),
            path,
        )
        with self.source.loaded(self.device, self.dtype) as model:
            model = text_model(model)
            if not getattr(model, "can_generate", lambda: False)():
                raise _refused(f"{type(model).__name__} does not generate text in Transformers")
            for _ in numbers():
                size = min(at_once, wanted - done) if wanted > done else at_once
                written = self._append(path, script, done, size, model, told)
                done += len(written)
                yield from written

    def _append(
        self, path: Path, script: Script, done: int, size: int, model: Any, told: _Told
    ) -> list[Record]:
        """Write rows behind those that are there; those that another process wrote meanwhile are taken."""
        with _alone(path):
            there = list(_read(path))
            if len(there) > done:
                return there[done:]
            draws = draws_of(self.seed, range(done, done + size), told.steps, self.device)
            rows = write_rows(model, script, draws, len(self.tokenizer), lambda step: told.step(size, step))
            told.rows_done += size
            texts = self.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=False)
            written = rows.tolist()
            lines = [
                json.dumps({"text": text, TOKENS: row}, ensure_ascii=False)
                for text, row in zip(texts, written, strict=True)
            ]
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(_complete(path))
                file.seek(0, 2)
                file.write("".join(f"{line}\n" for line in lines).encode())
        return [_record(row) for row in written]

    def _script(self, item: DatasetItem) -> Script:
        if self.tokenizer is None:
            raise ConfigError('data set "self": writing text needs a tokenizer; name one with --tokenizer')
        if len(self.source.block_lists) > 1:
            raise _refused("the model has several lists of blocks, such as an encoder and a decoder")
        script = script_of(self.tokenizer, self.source.facts.text, item)
        if self.seqlen < 2 * (count := len(script.opening)):
            raise ConfigError(
                f'data set "self": every row begins with {count} tokens of the chat template, which is most '
                f"of {self.seqlen}; use a larger seqlen, or plain text (self:apply_chat_template=false)"
            )
        return script

    def _name(self, item: DatasetItem) -> str:
        """Name of the file: the model's, and a digest of all that decides what is written."""
        told = {
            "model": model_fingerprint(self.source),
            "tokenizer": hashlib.sha256(
                repr(sorted(self.tokenizer.get_vocab().items())).encode()
            ).hexdigest(),
            "template": self.tokenizer.chat_template and str(self.tokenizer.chat_template),
            "use_template": item.apply_chat_template,
            "system": item.system_prompt,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "temperature": TEMPERATURE,
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        model = self.source.folder.name if self.source.folder is not None else self.source.model_class
        return f"{model}-{digest}"


class _Told:
    """Says now and then how far it is.

    Args:
        steps: tokens written of each row.
        rows: rows that are wanted.
    """

    def __init__(self, steps: int, rows: int) -> None:
        self.steps, self.rows, self.rows_done = steps, rows, 0
        self._start = self._last = time.perf_counter()

    def step(self, rows: int, step: int) -> None:
        """A token more of so many rows is written."""
        now = time.perf_counter()
        if now - self._last < _TOLD_EVERY:
            return
        self._last, done = now, self.rows_done * self.steps + rows * step
        left = max(self.rows, self.rows_done + rows) * self.steps - done
        logger.info(
            'data set "self": %d tokens written, about %s left',
            done,
            duration((now - self._start) * left / done),
        )


def _refused(reason: str) -> UnsupportedError:
    remedy = "write the text elsewhere, or take other text, and give the file: --dataset FILE.jsonl"
    return UnsupportedError(
        "the model cannot write its own calibration text", [Refusal("self", reason, remedy)]
    )


def _read(path: Path) -> Iterator[Record]:
    """Rows of a file; what a killed run left unfinished is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield _record(json.loads(line)[TOKENS])


def _record(ids: Sequence[int]) -> Record:
    """A row of which every token counts."""
    return {TOKENS: ids, MASK: [1] * len(ids)}


def _complete(path: Path) -> int:
    """Bytes of a file's complete lines."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process writes this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("ab") as file:
        while True:
            try:
                try_lock(file.fileno())
            except OSError as error:
                if error.errno not in HELD:  # a file system without locks
                    break
                time.sleep(0.5)
            else:
                break
        yield
