"""Token sequences of any length to rows of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from auto_round.calibration.records import Tokens
from auto_round.calibration.row import CalibrationRow

Sequences = Iterable[Tokens | CalibrationRow]
Drop = Callable[[str, int], None]
"""Called with the reason and the length of each sample that gives no row."""


class Reason:
    """Why a sample gives no row."""

    EMPTY = "empty"
    SHORT = "shorter than seqlen"
    TAIL = "with one token repeated over more than half of the row's end"
    PADDING = "all padding"
    LONG = "with images and longer than seqlen"
    NO_IMAGE = "with the token of an image but no image"


def cut_rows(samples: Sequences, seqlen: int, drop: Drop) -> Iterator[CalibrationRow]:
    """Yield the first `seqlen` ids of each sample that has so many, with their mask where it hides something.

    Dropped are shorter samples, and text that ends in one token repeated for more than `seqlen / 2`. Token
    ids that a user made are taken as they are. Rows with images may be shorter, and cannot be cut.
    """
    for tokens in samples:
        if isinstance(tokens, CalibrationRow):
            yield from _whole(tokens, seqlen, drop)
            continue
        ids = tokens.ids[:seqlen]
        mask = None if tokens.mask is None else tokens.mask[:seqlen]
        if mask is not None and bool(mask.all()):
            mask = None
        reason = _reason(ids, mask, seqlen)
        if reason == Reason.TAIL and tokens.ready:
            reason = None
        if reason is None:
            yield CalibrationRow.of_tokens(ids, mask)
        else:
            drop(reason, len(tokens.ids))


def join_rows(samples: Sequences, seqlen: int, drop: Drop) -> Iterator[CalibrationRow]:
    """Yield rows of `seqlen` ids from all samples joined, without their padding and the unfilled last row."""
    waiting = torch.zeros(0, dtype=torch.int64, device="cpu")
    for tokens in samples:
        if isinstance(tokens, CalibrationRow):
            yield from _whole(tokens, seqlen, drop)
            continue
        ids = tokens.ids if tokens.mask is None else tokens.ids[tokens.mask]
        if not len(ids):
            drop(Reason.EMPTY if not len(tokens.ids) else Reason.PADDING, 0)
            continue
        joined = torch.cat([waiting, ids])
        full = len(joined) // seqlen * seqlen
        for row in joined[:full].reshape(-1, seqlen):
            if _repeats(row, seqlen):
                drop(Reason.TAIL, seqlen)
            else:
                yield CalibrationRow.of_tokens(row)
        waiting = joined[full:]


def _whole(row: CalibrationRow, seqlen: int, drop: Drop) -> Iterator[CalibrationRow]:
    if len(row) <= seqlen:
        yield row
    else:
        drop(Reason.LONG, len(row))


def _reason(ids: Tensor, mask: Tensor | None, seqlen: int) -> str | None:
    if not len(ids):
        return Reason.EMPTY
    if len(ids) < seqlen:
        return Reason.SHORT
    if mask is not None and not bool(mask.any()):
        return Reason.PADDING
    return Reason.TAIL if _repeats(ids if mask is None else ids[mask], seqlen) else None


def _repeats(ids: Tensor, seqlen: int) -> bool:
    """Tell whether the last token fills more than the last `seqlen / 2` places."""
    others = (ids != ids[-1]).nonzero()
    run = len(ids) - (int(others[-1]) + 1 if len(others) else 0)
    return run > seqlen / 2
