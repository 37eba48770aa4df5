"""Calibration rows: token ids of one length, cut from a mixture of data sets, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from auto_round.calibration.chat import Tokenizer
from auto_round.calibration.encode import BATCH, TextOptions, encode
from auto_round.calibration.grammar import DatasetItem, parse_dataset
from auto_round.calibration.pictures import ImageReader
from auto_round.calibration.records import Sample, samples_of
from auto_round.calibration.row import CalibrationRow, fingerprint, of_one_length
from auto_round.calibration.shape import Reason, cut_rows, join_rows
from auto_round.calibration.sources import NOTHING, OfModel, RecordSource, open_item, own_source
from auto_round.errors import ConfigError
from auto_round.models.hub import Platform

Dataset = str | Path | Iterable[object]


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What one data set gave.

    Attributes:
        name: of the data set.
        samples: samples read from it.
        rows: rows made of them.
        dropped: reason -> number of samples that gave no row for it.
    """

    name: str
    samples: int
    rows: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationRows:
    """What `load_rows` found.

    Attributes:
        rows: at least one row, all of the same length.
        fingerprint: SHA-256 of all inputs and masks, see `row.fingerprint`.
        dropped: reason -> number of samples that gave no row for it.
        summary: a sentence for each data set, for people.
        sources: the same in numbers.
        letters: script -> letters in it, see `writing_systems`; empty where nothing tells the text of tokens.
        missing: a sentence where there are fewer rows than were wanted; else empty.
    """

    rows: tuple[CalibrationRow, ...]
    fingerprint: str
    dropped: Counter[str]
    summary: str
    sources: tuple[SourceRows, ...] = ()
    letters: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""


def load_rows(
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    platform: Platform = "hf",
    of_model: OfModel = NOTHING,
) -> CalibrationRows:
    """Read, tokenize and cut calibration data.

    Samples shorter than `seqlen` are dropped and longer ones cut, unless the data set is concatenated. Data
    sets with `num=` give that many rows, the others share the rest; what one of these lacks, the others make
    up for. A mixture is shuffled. The user's own records keep their order. Little more is tokenized than the
    rows need.

    Args:
        dataset: a specification (see `grammar`), a path, or records (see `sources.own_source`).
        tokenizer: may be None when the records are token ids.
        nsamples: rows wanted; fewer come when the data holds fewer.
        seqlen: tokens a row.
        seed: decides which samples are taken and in which order.
        platform: hub asked for names.
        of_model: what the model itself makes rows of: images, and text of its own. Rows with images keep
            their length, at most `seqlen`; then all are padded to that of the longest.

    Raises:
        ConfigError: the specification, a file or a record is wrong, or not one row could be made.
    """
    for name, value in (("nsamples", nsamples), ("seqlen", seqlen)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    streams = [
        _Stream(source, options, tokenizer, seqlen, random.Random(f"{seed}/{index}"), of_model.images)
        for index, (source, options) in enumerate(_sources(dataset, platform, of_model, nsamples))
    ]
    rows = _mix(streams, nsamples, random.Random(seed))
    summary = "; ".join(stream.report() for stream in streams)
    dropped = sum((stream.dropped for stream in streams), Counter[str]())
    if not rows:
        raise ConfigError(
            f"no calibration row of {seqlen} tokens could be made: {summary}. "
            f"{_remedy(dropped, of_model.prefix, streams)}"
        )
    missing = ""
    if len(rows) < nsamples:
        missing = (
            f"{len(rows)} of {nsamples} calibration rows of {seqlen} tokens: {summary}. "
            f"{_remedy(dropped, of_model.prefix, streams)}"
        )
    sources = tuple(
        SourceRows(stream.source.name, stream.read, stream.given, dict(sorted(stream.dropped.items())))
        for stream in streams
    )
    padding = 0 if tokenizer is None else tokenizer.pad_token_id
    equal = of_one_length(rows, padding or 0)
    return CalibrationRows(equal, fingerprint(equal), dropped, summary, sources, missing=missing)


def _sources(
    dataset: Dataset, platform: Platform, of_model: OfModel, nsamples: int
) -> Iterator[tuple[RecordSource, DatasetItem]]:
    if isinstance(dataset, Path):
        item = DatasetItem(str(dataset))
        yield open_item(item, platform), item
    elif isinstance(dataset, str):
        items = parse_dataset(dataset)
        sharing = sum(item.num is None for item in items)
        left = max(0, nsamples - sum(item.num or 0 for item in items))
        for item in items:
            wanted = -(-left // sharing) if item.num is None else item.num
            yield open_item(item, platform, of_model.own_text, wanted), item
    elif isinstance(dataset, Iterable):
        records = [dataset] if isinstance(dataset, Mapping) else dataset
        yield own_source(records), DatasetItem("the given data")
    else:
        raise ConfigError(
            f"dataset is of type {type(dataset).__name__}; expected a name, a path, a list of texts or "
            "token ids, or a DataLoader"
        )


@dataclass(slots=True)
class _Stream:
    """Rows of one data set, made as they are asked for, with a count of what was read and dropped."""

    source: RecordSource
    item: DatasetItem
    tokenizer: Tokenizer | None
    seqlen: int
    shuffler: random.Random
    images: ImageReader | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0
    given: int = 0
    longest: int = 0
    exhausted: bool = False
    rows: Iterator[CalibrationRow] = field(init=False)

    def __post_init__(self) -> None:
        concat = self.source.concat if self.item.concat is None else self.item.concat
        options = TextOptions(
            seqlen=None if concat else self.seqlen,
            use_template=self.item.apply_chat_template,
            system_prompt=self.item.system_prompt,
            images=None if self.images is None else partial(self.images.row, beside=self.source.folder),
            at_once=1 if self.images is not None or self.source.dear else BATCH,
        )
        tokens = encode(self._samples(), self.tokenizer, options, self.source.name)
        shape = join_rows if concat else cut_rows
        self.rows = self._with_their_images(shape(tokens, self.seqlen, self._drop))

    def take(self, count: int) -> list[CalibrationRow]:
        """Return up to `count` further rows."""
        taken: list[CalibrationRow] = []
        while len(taken) < count and not self.exhausted:
            row = next(self.rows, None)
            if row is None:
                self.exhausted = True
            else:
                taken.append(row)
        self.given += len(taken)
        return taken

    def report(self) -> str:
        """Return what was kept and why the rest was dropped."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        if self.dropped.keys() & {Reason.SHORT, Reason.LONG}:
            reasons += f" (the longest of these has {self.longest})"
        text = f"{self.source.name}: {self.given} rows from {self.read} samples"
        return f"{text}; dropped: {reasons}" if reasons else text

    def _drop(self, reason: str, length: int) -> None:
        self.dropped[reason] += 1
        self.longest = max(self.longest, length)

    def _with_their_images(self, rows: Iterable[CalibrationRow]) -> Iterator[CalibrationRow]:
        for row in rows:
            if self.images is not None and self.images.lacks_image(row):
                self._drop(Reason.NO_IMAGE, len(row))
            else:
                yield row

    def _samples(self) -> Iterator[Sample]:
        for index, record in self._records():
            for sample in samples_of(record, self.source.fields, f"{self.source.name}, record {index}"):
                self.read += 1
                yield sample

    def _records(self) -> Iterator[tuple[int, object]]:
        records = self.source.records
        if self.source.keep_order or not isinstance(records, Sequence):
            yield from enumerate(records)
            return
        order = list(range(len(records)))
        self.shuffler.shuffle(order)
        for index in order:
            yield index, records[index]


def _mix(streams: Sequence[_Stream], nsamples: int, shuffler: random.Random) -> list[CalibrationRow]:
    """Take what each stream owes; streams without `num=` share the rest and stand in for each other."""
    rows: list[CalibrationRow] = []
    for stream in streams:
        if stream.item.num is not None:
            rows += stream.take(stream.item.num)
    open_streams = [stream for stream in streams if stream.item.num is None]
    while open_streams and len(rows) < nsamples:
        share, extra = divmod(nsamples - len(rows), len(open_streams))
        for index, stream in enumerate(open_streams):
            rows += stream.take(share + (index < extra))
        open_streams = [stream for stream in open_streams if not stream.exhausted]
    if len(streams) > 1:
        shuffler.shuffle(rows)
    return rows[:nsamples]


def _remedy(dropped: Counter[str], prefix: str, streams: Sequence[_Stream]) -> str:
    if all(stream.given == stream.item.num for stream in streams):
        return f"Ask for more with :num=, leave it out, or ask for fewer rows ({prefix}nsamples)."
    if dropped[Reason.LONG]:
        return f"Use a larger {prefix}seqlen, or smaller images: rows with images are not cut."
    if dropped[Reason.SHORT]:
        return (
            f"Use a smaller {prefix}seqlen, join short samples (:concat after the data set's name), or give "
            "more data."
        )
    return f"Give more data, or ask for fewer rows ({prefix}nsamples)."
