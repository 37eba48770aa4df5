"""Matrices outside of the blocks, rounded by an option: the output head and the token embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.autoscheme.parts import Part, ScoringSetting
from auto_round.facts.flow import States
from auto_round.models.source import CPU
from auto_round.pipeline.running.rounding import round_matrix


def weight_outside(setting: ScoringSetting, part: Part, option: int) -> Tensor:
    """The head or the embedding rounded by an option, in the dtype that it computes in.

    Args:
        setting: what is measured.
        part: the head, or the embedding.
        option: number of the option.
    """
    job = setting.job
    layer = setting.candidates.layers[part.layers[0]]
    scheme = setting.candidates.plans[option].scheme_of(layer.name)
    fmt = None if scheme is None else scheme.weight_format()
    weight = job.source.read(layer)
    if scheme is None or fmt is None:
        return weight.to(job.device, job.dtype)
    q = round_matrix(layer.tensor, weight, fmt, job.device, effort=setting.effort(scheme.bits))
    return q.format.dequantize(q, job.dtype)


def begin_rounded(setting: ScoringSetting, part: Part, option: int, start: States) -> States:
    """What flows into the first block where the embedding is rounded by an option.

    Args:
        setting: what is measured, and on what.
        part: the embedding.
        option: number of the option.
        start: what flows into it of the original, `[rows, length, width]` each.
    """
    job = setting.job
    rows = job.all_rows
    moved = tuple(torch.empty_like(state) for state in start)
    pictured = any(row.beside_text for row in rows)
    weight = weight_outside(setting, part, option)
    with job.source.stem(CPU, job.dtype, head=False, towers=pictured) as stem, stem.embedding(weight):
        for i, row in enumerate(rows):
            for to, state in zip(moved, stem.trace(row.inputs).states, strict=True):
                to[i : i + 1] = state.to(to.device, to.dtype)
    return moved
