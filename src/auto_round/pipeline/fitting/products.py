"""What a processor keeps of the products of matrices that a run makes in bfloat16."""

from __future__ import annotations

import math

import torch

from auto_round.facts.layer import Layer, Role
from auto_round.models.causal_attention import BANDS, QUERIES
from auto_round.models.expert_products import filled_up
from auto_round.pipeline.fitting.work import Workload, active_share
from auto_round.pipeline.machine.memory import KEPT_PRODUCTS
from auto_round.tuning.steps import batch_rows

PROGRAM = 550_000
"""Bytes of the program that oneDNN makes for products of one shape (measured, docs/LOG.md)."""
OF_ATTENTION = 3 * BANDS
"""Products of different shapes in attention by bands and its gradients (measured: 11 to 15)."""

UNEVEN = 2
"""Tokens of an expert that is asked more often than the mean of them; beyond are few."""


def kept_products(work: Workload, layers: list[Layer], rows: int) -> int:
    """Bytes of programs for the products of a group of blocks; 0 where none are made for each shape.

    Args:
        work: the run.
        layers: of the group.
        rows: most of them that go through it at once.
    """
    if work.device.type != "cpu" or work.dtype is not torch.bfloat16 or not work.rows:
        return 0
    sizes = {batch_rows(work.tune, step) for step in range(work.tune.iters)}
    tuned = {size for batch in sizes for size in _passes(batch, rows)}
    passed = {size for many in (work.rows, work.held_out) for size in _passes(many, rows)} - tuned
    whole = len({layer.shape for layer in layers if layer.role is not Role.EXPERT})
    shapes = len({layer.shape for layer in layers if layer.role is Role.EXPERT})
    experts = len({layer.expert for layer in layers if layer.role is Role.EXPERT})
    alone = all(work.source.tells_experts_apart(a.parameter) for a in layers if a.role is Role.EXPERT)
    count = len(tuned) * (3 * whole + OF_ATTENTION) + len(passed) * whole
    count += 2 * math.ceil(work.seqlen / QUERIES)  # attention without gradients: a few rows at a time
    # Experts get other numbers of tokens in each pass, unless all of them get all tokens.
    for sizes, each in ((tuned, 3), (passed, 1)):
        most = int(UNEVEN * active_share(work.source) * max(sizes, default=0) * work.seqlen)
        numbers = {filled_up(n) for n in range(1, most + 1)}
        passes = work.tune.iters if each == 3 else 1
        many = min(len(numbers), experts * len(sizes) * passes) if alone else len(sizes)
        count += each * shapes * many
    return min(KEPT_PRODUCTS, count) * PROGRAM


def _passes(rows: int, at_once: int) -> set[int]:
    """Rows that go through a block at once, where `rows` of them do in turn."""
    return {min(rows, at_once), rows % at_once} - {0}
