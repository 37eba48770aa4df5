"""The tuning step by torch.compile, where `deciding.compiling` says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from auto_round.log import logger
from auto_round.pipeline.deciding.compiling import TuningSteps
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.objective import PLAIN, Objective, block_objective
from auto_round.tuning.steps import batch_rows
from auto_round.tuning.weights import fake_weights


def objective_for(steps: TuningSteps | None) -> Objective:
    """The functions of a tuning step, compiled where that is asked for or saves time; None for no steps."""
    if steps is None:
        return PLAIN
    if reason := steps.hindrance:
        level = logger.warning if steps.wanted else logger.info
        level("blocks are not compiled: %s", reason)
    return compiled_objective() if steps.compiled else PLAIN


def in_equal_passes(config: TuneConfig, tuned: int, ranks: int = 1) -> TuneConfig:
    """The same settings, but every pass through the block has the same number of rows.

    Compiled code is made for one shape, while batches grow during a run: so each batch is cut into passes of
    a size that divides all of them.

    Args:
        config: settings of the loop.
        tuned: rows that are tuned on.
        ranks: how many processes have to find passes in the smallest batch, if it has as many rows.
    """
    sizes = {min(batch_rows(config, step), tuned) for step in range(config.iters)}
    common = math.gcd(*sizes)
    most = min(common, config.rows_at_once or common, -(-min(sizes) // ranks))
    return replace(config, rows_at_once=next(n for n in range(most, 0, -1) if common % n == 0))


def compiled_objective(backend: str | Callable[..., Any] = "inductor") -> Objective:
    """Both functions of a tuning step, compiled; blocks of one kind share the compiled code.

    Args:
        backend: compiler of `torch.compile`.
    """
    compiled = _Compiled(fake_weights, backend), _Compiled(block_objective, backend)
    return Objective(*compiled, matrix_by_matrix=False)


class _Compiled:
    """A compiled function; when the compiler fails the reason is logged and the plain function runs."""

    def __init__(self, plain: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self._plain = plain
        self._compiled: Callable[..., Any] | None = torch.compile(plain, dynamic=False, backend=backend)

    def __call__(self, *arguments: Any) -> Any:
        """What the plain function gives."""
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except (RuntimeError, TypeError, AttributeError) as error:  # compilers raise subclasses of these
                logger.warning("blocks are not compiled: %s", str(error).strip().split("\n")[0])
                self._compiled = None
        return self._plain(*arguments)
