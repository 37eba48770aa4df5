"""Choice: one option for each group so that the sum of losses is least and the bits fit, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from auto_round.errors import ConfigError, InternalError

Table = Sequence[Sequence[float]]
"""A number for each group and option."""

_SECONDS = 120.0
"""Longest search; what is best by then is taken, and its gap reported."""

_ATTEMPTS = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """The option chosen for each group of layers, and what that costs and loses.

    Attributes:
        picks: option of each group.
        cost: sum of the costs.
        loss: sum of the losses.
        gap: how much better the best solution could be at most, as a share of `loss`; 0 where it is proved
            that none is.
    """

    picks: tuple[int, ...]
    cost: float
    loss: float
    gap: float


def least_loss(costs: Table, losses: Table, budget: float) -> Choice:
    """The options of least loss whose costs fit into a budget.

    Args:
        costs: of each group and option, any unit.
        losses: of each group and option.
        budget: largest sum of costs.

    Raises:
        ConfigError: even the cheapest options cost more; says what can be reached.
        NumericsError: never; losses are checked where they are measured.
    """
    cost, loss = _tables(costs, losses)
    least = float(cost.min(axis=1).sum())
    if least > budget:
        raise ConfigError(f"a budget of {budget:.6g} is below the least that can be reached, {least:.6g}")
    return _solve(objective=loss, limited=cost, limit=budget, cost=cost, loss=loss)


def least_cost(costs: Table, losses: Table, most: float) -> Choice:
    """The options of least cost whose losses add up to `most` or less; arguments and errors as above."""
    cost, loss = _tables(costs, losses)
    least = float(loss.min(axis=1).sum())
    if least > most:
        raise ConfigError(f"a loss of {most:.6g} is below the least that can be reached, {least:.6g}")
    return _solve(objective=cost, limited=loss, limit=most, cost=cost, loss=loss)


Numbers = NDArray[np.float64]


def _tables(costs: Table, losses: Table) -> tuple[Numbers, Numbers]:
    cost, loss = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if (
        cost.shape != loss.shape
        or cost.ndim != 2
        or not np.isfinite(cost).all()
        or not np.isfinite(loss).all()
    ):
        raise InternalError(
            f"costs {cost.shape} and losses {loss.shape} are no two finite tables of one shape"
        )
    return cost, loss


def _solve(*, objective: Numbers, limited: Numbers, limit: float, cost: Numbers, loss: Numbers) -> Choice:
    """Least sum of `objective` with the sum of `limited` at most `limit`.

    The solver keeps a limit within its own tolerance only, so where a solution is beyond it, the limit is
    drawn in by what it is beyond, and asked again. Both sums are scaled, as its tolerances are absolute.
    """
    groups = np.arange(len(cost))
    slack = 0.0
    for _ in range(_ATTEMPTS):
        picks, gap = _milp(objective, limited, limit - slack)
        beyond = float(limited[groups, picks].sum()) - limit
        if beyond <= 0:
            return Choice(
                tuple(map(int, picks)),
                float(cost[groups, picks].sum()),
                float(loss[groups, picks].sum()),
                gap,
            )
        slack += 2 * beyond
    picks = limited.argmin(axis=1)  # the limit is within the tolerance of the least sum there is
    return Choice(
        tuple(map(int, picks)), float(cost[groups, picks].sum()), float(loss[groups, picks].sum()), 0.0
    )


def _milp(objective: Numbers, limited: Numbers, limit: float) -> tuple[NDArray[np.intp], float]:
    """Option of each group, and the relative gap that is left."""
    from highspy import Highs, HighsLp, HighsModelStatus, HighsVarType, MatrixFormat, SolutionStatus

    count, options = objective.shape
    above = objective - objective.min(axis=1, keepdims=True)  # what is paid in any case does not matter
    scale = 1e4 / max(float(above.max(axis=1).sum()), 1e-300)
    free = limit - float(limited.min(axis=1).sum())
    over = limited - limited.min(axis=1, keepdims=True)
    unit = max(abs(free), 1e-300)
    solver = Highs()
    solver.setOptionValue("output_flag", False)
    model = HighsLp()
    model.num_col_, model.num_row_ = count * options, count + 1
    model.col_cost_ = (above * scale).reshape(-1)
    model.col_lower_, model.col_upper_ = np.zeros(count * options), np.ones(count * options)
    model.integrality_ = [HighsVarType.kInteger] * (count * options)
    # Row by row: one option of each group, then what they come to together.
    model.row_lower_ = np.concatenate([np.ones(count), [-np.inf]])
    model.row_upper_ = np.concatenate([np.ones(count), [free / unit]])
    every = np.arange(count * options)
    model.a_matrix_.format_ = MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.concatenate([every[::options], [count * options, 2 * count * options]])
    model.a_matrix_.index_ = np.concatenate([every, every])
    model.a_matrix_.value_ = np.concatenate([np.ones(count * options), over.reshape(-1) / unit])
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("time_limit", _SECONDS)
    solver.passModel(model)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if info.primal_solution_status != SolutionStatus.kSolutionStatusFeasible:
        if free <= 0 or status is HighsModelStatus.kInfeasible:
            return limited.argmin(axis=1), 0.0
        raise InternalError(f"the solver found no plan: {solver.modelStatusToString(status)}")
    chosen = np.asarray(solver.getSolution().col_value).reshape(count, options)
    return chosen.argmax(axis=1), float(info.mip_gap)
