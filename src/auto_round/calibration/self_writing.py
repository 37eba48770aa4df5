"""Tokens drawn from a model one by one, many rows at a time, with what a script puts between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.self_script import Script

TEMPERATURE = 1.0
"""The model's own probabilities: text as often as the model says it."""


class Pen:
    """Chooses the next token of each row, as a logits processor of Transformers.

    What is drawn follows from numbers that are made beforehand for each row, so that a row does not depend
    on the rows beside it, nor on the device, but for the rounding of sums.

    Args:
        script: what is given.
        draws: `[rows, steps]` float32, between 0 and 1.
        words: tokens that the tokenizer knows; a model may have more.
        told: hears after each step how many were taken.
    """

    def __init__(self, script: Script, draws: Tensor, words: int, told: Callable[[int], None]) -> None:
        self._script, self._draws, self._words, self._told = script, draws, words, told
        self._step = 0
        self._turn = [0] * len(draws)
        self._silent = torch.ones(len(draws), dtype=torch.bool, device=draws.device)
        self._waiting: list[list[int]] = [[] for _ in draws]

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave one token a row.

        Args:
            tokens: `[rows, length]`, so far.
            scores: `[rows, vocabulary]`, logits of the next.
        """
        del tokens
        drawn = self._drawn(scores.float()).tolist()
        chosen = [self._given(row, token) for row, token in enumerate(drawn)]
        self._step += 1
        self._told(self._step)
        only = torch.full_like(scores, float("-inf"))
        return only.scatter_(1, torch.tensor(chosen, dtype=torch.int64, device=scores.device)[:, None], 0.0)

    def _drawn(self, scores: Tensor) -> Tensor:
        """A token a row by its probability; a turn does not end before it began."""
        never = float("-inf")
        scores = scores / TEMPERATURE
        scores[:, self._words :] = never
        words = scores.shape[1]
        scores[:, [token for token in self._script.unspoken if token < words]] = never
        for token in (token for token in self._script.ends if token < words):
            scores[self._silent, token] = never
        sums = scores.softmax(-1).cumsum(-1)
        draw = self._draws[:, self._step, None] * sums[:, -1:]
        # The draw may round up to the sum of all: then it is the last token that has a probability.
        last = (sums < sums[:, -1:]).sum(-1)
        return torch.searchsorted(sums, draw, right=True)[:, 0].minimum(last)

    def _given(self, row: int, token: int) -> int:
        """What stands at this place of a row: what waits, else the token, else what comes behind a turn."""
        waiting, script = self._waiting[row], self._script
        if not waiting and token not in script.ends:
            self._silent[row] = False
            return token
        if not waiting:
            waiting += script.behind[self._turn[row] % len(script.behind)]
            self._turn[row] += 1
        self._silent[row] = True
        return waiting.pop(0)


def draws_of(seed: int, rows: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """Numbers from 0 to 1, `[rows, steps]` float32: those of a row follow from the seed and its number."""
    found = []
    for row in rows:
        digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        found.append(torch.rand(steps, generator=generator, dtype=torch.float32, device="cpu"))
    return torch.stack(found).to(device)


def write_rows(model: Any, script: Script, draws: Tensor, words: int, told: Callable[[int], None]) -> Tensor:
    """Let a model write rows.

    Args:
        model: a copy of our own, with its weights: its settings of generation are replaced, since those left
            out of others would count.
        script: what it is given.
        draws: `[rows, steps]`, see `Pen`.
        words: tokens that the tokenizer knows.
        told: hears after each step how many were taken.

    Returns:
        `[rows, opening + steps]` int64, on the host.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    opening = torch.tensor(script.opening, dtype=torch.int64, device=draws.device).expand(len(draws), -1)
    model.generation_config = GenerationConfig(
        max_new_tokens=draws.shape[1], do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    pen = LogitsProcessorList([Pen(script, draws, words, told)])
    with torch.inference_mode():
        found: Tensor = model.generate(
            opening.contiguous(), attention_mask=torch.ones_like(opening), logits_processor=pen
        )
    return found.cpu()
