"""Sensitivity as it is: one part is rounded, and the divergence of the whole model's predictions is measured.

Each part and option has a stream of hidden states of its own from its block on. All streams move through the
blocks together, so weights are read once; where the streams are too large for memory, in several passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from auto_round.autoscheme.outside import begin_rounded, weight_outside
from auto_round.autoscheme.parts import Part, ScoringSetting, Trial, open_block
from auto_round.autoscheme.start import begin
from auto_round.evaluate.logits import positions_at_once
from auto_round.facts.flow import States
from auto_round.pipeline.running.block_arguments import ArgumentTable

STREAM_BYTES = 2 << 30
"""Memory for the streams of one pass."""


def measure(
    setting: ScoringSetting, parts: Sequence[Part], scratch: Path
) -> Iterator[tuple[Part, list[float]]]:
    """Mean KL(original || rounded) when one part is rounded, nats per token, for each option.

    Args:
        setting: what is measured, and on what.
        parts: parts to measure.
        scratch: folder for what does not fit into memory.

    Yields:
        Each part with its scores, a pass at a time.

    Raises:
        NumericsError: a weight is not finite.
    """
    table, start, masks = begin(setting, scratch)
    nbytes = sum(state.numel() * state.element_size() for state in start)
    at_once = max(1, STREAM_BYTES // (nbytes * len(setting.options)))
    for first in range(0, len(parts), at_once):
        chunk = parts[first : first + at_once]
        scores = _pass(setting, chunk, table, start, masks)
        for part in chunk:
            yield part, [scores.get((part, option), 0.0) for option in setting.options]


def _pass(
    setting: ScoringSetting, parts: Sequence[Part], table: ArgumentTable, start: States, masks: Tensor | None
) -> dict[Trial, float]:
    """Scores of some parts; nothing for options that keep a part."""
    reference = tuple(state.clone() for state in start)
    moving: dict[Trial, States] = {}
    trials = [(part, o) for part in parts for o in setting.options if not setting.keeps(part, o)]
    for part, option in trials:
        if part.layers[0] == setting.embedding:
            moving[part, option] = begin_rounded(setting, part, option, start)
    for block in setting.job.source.blocks:
        mine = [trial for trial in trials if trial[0].block == block.index]
        with open_block(setting, block.index, table, [part for part, _ in mine]) as opened:
            for states in moving.values():
                opened.pass_on(states, states)
            if mine:
                opened.observe(reference, [part for part, _ in mine], masks)
            for part, option in mine:
                moving[part, option] = tuple(torch.empty_like(state) for state in reference)
                opened.pass_on(reference, moving[part, option], opened.rounded(part, option))
            opened.pass_on(reference, reference)
    heads = [part for part in parts if setting.at_the_head(part)]
    return divergences(setting, reference, {trial: states[0] for trial, states in moving.items()}, heads)


def divergences(
    setting: ScoringSetting, reference: States, moved: Mapping[Trial, Tensor], heads: Sequence[Part]
) -> dict[Trial, float]:
    """Mean KL of each stream from the reference, and of rounded heads on their stream or the reference.

    Args:
        setting: what is measured, and on what.
        reference: what flows out of the last block of the original.
        moved: the first of the same, where a part is rounded.
        heads: parts that the output head multiplies with.

    Returns:
        A score for each stream, and for each head and option that rounds it.
    """
    job = setting.job
    rows = job.all_rows
    rounding = [(part, o) for part in heads for o in setting.options if not setting.keeps(part, o)]
    weights = {trial: weight_outside(setting, *trial) for trial in rounding}
    sums, counted = dict.fromkeys([*moved, *weights], 0.0), 0
    step = positions_at_once(job.source.facts.vocabulary)
    with job.source.stem(job.device, job.dtype) as stem, torch.no_grad():
        for r, row in enumerate(rows):
            for start in range(0, len(row), step):
                here = (slice(r, r + 1), slice(start, start + step))
                hidden = reference[0][here].to(job.device)
                mask = None if row.mask is None else row.mask[here[1]].to(job.device)
                before = stem.finish(hidden)[0].float().log_softmax(-1)
                for trial in sums:
                    other = moved[trial][here].to(job.device) if trial in moved else hidden
                    logits = stem.finish(other, weights.get(trial))[0]
                    sums[trial] += _divergence(before, logits, mask)
                counted += hidden.shape[1] if mask is None else int(mask.sum())
    return {trial: total / max(1, counted) for trial, total in sums.items()}


def _divergence(before: Tensor, logits: Tensor, mask: Tensor | None) -> float:
    """Sum of KL over positions that count; `before` are log-probabilities `[positions, vocabulary]`."""
    after = logits.float().log_softmax(-1)
    found = (before.exp() * (before - after)).sum(-1)
    return float((found if mask is None else found[mask]).double().sum())
