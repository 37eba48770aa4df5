"""Samples to token ids, a few texts at a time, so that no more is tokenized than is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from auto_round.calibration.chat import Tokenizer, render_chat
from auto_round.calibration.records import Conversation, Pictured, Sample, Tokens
from auto_round.calibration.row import CalibrationRow
from auto_round.errors import ConfigError

BATCH = 16
CHARACTERS_PER_TOKEN = 32
"""Of a longer text only this many characters for each wanted token are tokenized; English has about 4."""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How text becomes tokens.

    Attributes:
        seqlen: cut to this many tokens; None: keep all.
        use_template: see `chat.render_chat`.
        system_prompt: see `chat.render_chat`.
        images: makes a row of text with images; None where the model reads none.
        at_once: samples that are read together; an image is much to hold.
    """

    seqlen: int | None
    use_template: bool | None = None
    system_prompt: str | None = None
    images: Callable[[Pictured], CalibrationRow] | None = None
    at_once: int = BATCH


def encode(
    samples: Iterable[Sample], tokenizer: Tokenizer | None, options: TextOptions, where: str
) -> Iterator[Tokens | CalibrationRow]:
    """Yield the tokens of each sample, in order; an empty text has none. Samples with images are rows.

    Args:
        samples: read a few at a time, as far as they are used.
        tokenizer: may be None when every sample is tokens.
        options: how text becomes tokens.
        where: name of the data set for messages.

    Raises:
        ConfigError: text without a tokenizer, or a chat template that is missing or refuses.
    """
    iterator = iter(samples)
    while batch := list(islice(iterator, options.at_once)):
        if tokenizer is None and any(isinstance(sample, (str, Conversation)) for sample in batch):
            raise ConfigError(f"data set {where} holds text, which needs a tokenizer; give one, or token ids")
        yield from _encode_batch(batch, tokenizer, options)


def _encode_batch(
    batch: Sequence[Sample], tokenizer: Tokenizer | None, options: TextOptions
) -> Iterator[Tokens | CalibrationRow]:
    made: dict[int, Tokens | CalibrationRow] = {}
    plain: dict[int, str] = {}
    templated: dict[int, str] = {}
    for index, sample in enumerate(batch):
        if isinstance(sample, Tokens):
            made[index] = _without_padding(sample, tokenizer)
        elif isinstance(sample, CalibrationRow):
            made[index] = sample
        elif isinstance(sample, Pictured):
            made[index] = _row_of(sample, options)
        elif sample and tokenizer is not None:
            text, special = render_chat(sample, tokenizer, options.use_template, options.system_prompt)
            (templated if special else plain)[index] = text
    for texts, add_special in ((plain, True), (templated, False)):
        if tokenizer is None or not texts:
            continue
        ids = _tokenize(list(texts.values()), tokenizer, options.seqlen, add_special=add_special)
        made.update({index: Tokens(row) for index, row in zip(texts, ids, strict=True)})
    nothing = Tokens(torch.zeros(0, dtype=torch.int64, device="cpu"))
    yield from (made.get(index, nothing) for index in range(len(batch)))


def _row_of(sample: Pictured, options: TextOptions) -> CalibrationRow:
    if options.images is None:
        raise ConfigError(f"{sample.where} holds images, and this model reads text only: leave them out")
    return options.images(sample)


def _tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, seqlen: int | None, *, add_special: bool
) -> list[Tensor]:
    def call(batch: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(
            batch,
            add_special_tokens=add_special,
            truncation=seqlen is not None,
            max_length=seqlen,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return found

    if seqlen is None:
        return [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in call(list(texts))]
    limit = seqlen * CHARACTERS_PER_TOKEN
    rows = call([text[:limit] for text in texts])
    for index, text in enumerate(texts):
        if len(text) > limit and len(rows[index]) < seqlen:  # long runs of one character can be one token
            rows[index] = call([text])[0]
    return [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in rows]


def _without_padding(tokens: Tokens, tokenizer: Tokenizer | None) -> Tokens:
    """Mask the padding tokens that ready ids without a mask begin or end with.

    Inside a row they stay: where padding and end of text are one token, that is what they are. So does a row
    of nothing else, which its owner must have meant.
    """
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if tokens.mask is not None or not tokens.ready or pad is None:
        return tokens
    real = (tokens.ids != pad).nonzero().flatten().tolist()
    if not real:
        return tokens
    mask = torch.zeros_like(tokens.ids, dtype=torch.bool)
    mask[real[0] : real[-1] + 1] = True
    return Tokens(tokens.ids, mask, ready=True)
