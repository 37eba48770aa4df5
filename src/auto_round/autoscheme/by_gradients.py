"""Sensitivity by the Fisher information: the real error of a block's output, weighed by squared gradients.

To second order the divergence of a model's predictions from its own is half the mean square of (gradient of
the log-probability of a token drawn from the prediction) x (error). Gradients flow back block by block, and
each block is read once forward and once backward. The errors are real: those of the block's output when one
part of it is rounded, attention and all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from auto_round.autoscheme.by_divergence import divergences
from auto_round.autoscheme.parts import OpenBlock, Part, Setting, open_block, taken
from auto_round.autoscheme.start import begin
from auto_round.checkpoint.blobs import load_tensors, save_tensors
from auto_round.facts.flow import States
from auto_round.models.source import CPU
from auto_round.pipeline.running.block_arguments import ArgumentTable
from auto_round.pipeline.running.streams import home_of_streams, storage

DRAWS = 4
"""Tokens drawn from each prediction."""

SAVED = "gradients.safetensors"
"""File of the gradients behind the block that is next."""


def measure(setting: Setting, parts: Sequence[Part], scratch: Path) -> Iterator[tuple[Part, list[float]]]:
    """Estimate of the mean KL when one part is rounded, nats per token, for each option.

    Args:
        setting: what is measured, and on what.
        parts: parts to measure.
        scratch: folder for what does not fit into memory, and for gradients from which a killed run goes on.

    Yields:
        Each part with its scores: the head's, then block by block from the last to the first.

    Raises:
        NumericsError: a weight is not finite.
    """
    job = setting.job
    table, start, masks = begin(setting, scratch)
    boundaries = _forward(setting, table, start, scratch)
    heads = [part for part in parts if part.block is None]
    scores = divergences(setting, boundaries[-1], {}, heads) if heads else {}
    for part in heads:
        yield part, [scores.get((part, option), 0.0) for option in setting.options]
    wanted = [part.block for part in parts if part.block is not None]
    if not wanted:
        return
    saved = _load(scratch / SAVED, len(start))
    if saved is None or saved[0] <= max(wanted):
        saved = len(job.source.blocks), _at_the_end(setting, boundaries[-1], masks)
    behind, gradients = saved
    tokens = start[0].shape[0] * start[0].shape[1] if masks is None else int(masks.sum())
    for index in range(behind - 1, min(wanted) - 1, -1):
        mine = [part for part in parts if part.block == index]
        with open_block(setting, index, table, mine) as opened:
            if mine:
                opened.observe(boundaries[index], mine, masks)
            sums = _errors(opened, mine, boundaries[index], boundaries[index + 1], gradients)
            _move_back(opened, boundaries[index], gradients)
        del boundaries[index + 1 :]
        for part in mine:
            yield part, [sums.get((part, o), 0.0) / (2 * DRAWS * tokens) for o in setting.options]
        _save(scratch / SAVED, index, gradients)


def _forward(setting: Setting, table: ArgumentTable, start: States, scratch: Path) -> list[States]:
    """What flows into each block, and out of the last."""
    job = setting.job
    count = len(job.source.blocks) + 1
    nbytes = count * sum(state.numel() * state.element_size() for state in start)
    home = home_of_streams(job.level, job.memory, job.device, nbytes)
    spill = scratch / "boundaries" if home.files else None
    boundaries = [start]
    for block in job.source.blocks:
        out = tuple(
            storage(state.shape, state.dtype, home.device, spill, f"{block.index}-{i}")
            for i, state in enumerate(start)
        )
        with open_block(setting, block.index, table, []) as opened:
            opened.pass_on(boundaries[-1], out)
        boundaries.append(out)
    return boundaries


def _at_the_end(setting: Setting, final: States, masks: Tensor | None) -> list[States]:
    """Gradient of each draw's log-probability with respect to what flows out of the last block.

    Draws are made row by row from a generator of their own, so they do not depend on what runs together.
    """
    job = setting.job
    seed = job.options.calibration.seed
    gradients = [tuple(torch.zeros_like(state) for state in final) for _ in range(DRAWS)]
    with job.source.stem(job.device, job.dtype) as stem:
        for row in range(final[0].shape[0]):
            draws = torch.Generator(device=CPU).manual_seed(seed + row)
            shape = (DRAWS, final[0].shape[1])
            uniform = torch.rand(shape, generator=draws, dtype=torch.float64, device=CPU)
            hidden = final[0][row : row + 1].to(job.device).requires_grad_()
            with torch.enable_grad():
                likely = stem.finish(hidden)[0].float().log_softmax(-1)
            tokens = _draw(likely.detach(), uniform.to(likely.device))
            for k in range(DRAWS):
                picked = likely.gather(-1, tokens[k].unsqueeze(-1)).squeeze(-1)
                if masks is not None:
                    picked = picked[masks[row].to(picked.device)]
                (found,) = torch.autograd.grad(picked.sum(), hidden, retain_graph=k < DRAWS - 1)
                gradients[k][0][row] = found[0].to(gradients[k][0].device)
    return gradients


def _draw(likely: Tensor, uniform: Tensor) -> Tensor:
    """Tokens `[draws, length]` drawn from log-probabilities `[length, vocabulary]` by numbers in [0, 1)."""
    below = likely.double().exp().cumsum(-1)
    wanted = uniform.t().contiguous() * below[:, -1:]
    return torch.searchsorted(below, wanted, right=True).clamp_max(likely.shape[-1] - 1).t()


def _errors(
    opened: OpenBlock, parts: Sequence[Part], inputs: States, outputs: States, gradients: Sequence[States]
) -> dict[tuple[Part, int], float]:
    """Sum of (gradient x error)^2 for each part and option that rounds it.

    Args:
        opened: the block.
        parts: parts of it.
        inputs: what flows into it.
        outputs: what flows out of it when nothing is rounded.
        gradients: of each draw, with respect to what flows out.
    """
    setting = opened.setting
    sums: dict[tuple[Part, int], float] = {}
    trials = [(part, o) for part in parts for o in setting.options if not setting.keeps(part, o)]
    with torch.no_grad():
        for trial in trials:
            rounded = opened.rounded(*trial)
            sums[trial] = sum(
                _weighed(
                    taken(outputs, rows),
                    opened.run(taken(inputs, rows), rows, rounded),
                    [taken(g, rows) for g in gradients],
                )
                for rows in opened.batches()
            )
    return sums


def _weighed(clean: States, found: States, gradients: Sequence[States]) -> float:
    """Sum of (gradient x error)^2 over draws, rows and positions.

    Errors of the channels of a position are added before they are squared: they come from the same weights
    (docs/LOG.md compares both).
    """
    total = 0.0
    for state, (before, after) in enumerate(zip(clean, found, strict=True)):
        error = after.float() - before.to(after.device).float()
        for gradient in gradients:
            product = gradient[state].to(error.device) * error
            total += float(product.sum(dim=-1).square().double().sum())
    return total


def _move_back(opened: OpenBlock, inputs: States, gradients: Sequence[States]) -> None:
    """Replace gradients with respect to the outputs of a block by those with respect to its inputs."""
    device = opened.setting.job.device
    for rows in opened.batches():
        states = tuple(s.to(device).detach().requires_grad_() for s in taken(inputs, rows))
        with torch.enable_grad():
            out = opened.run(states, rows)
        for k, behind in enumerate(gradients):
            upstream = [g.to(o.device) for g, o in zip(taken(behind, rows), out, strict=True)]
            before = torch.autograd.grad(
                out,
                states,
                upstream,
                retain_graph=k < len(gradients) - 1,
                allow_unused=True,
                materialize_grads=True,
            )
            for to, value in zip(behind, before, strict=True):
                to[rows.start : rows.stop] = value.to(to.device)


def _save(path: Path, behind: int, gradients: Sequence[States]) -> None:
    """Keep the gradients of what flows into block `behind`: a killed run goes on with the one before."""
    tensors = {f"{k}.{i}": state for k, states in enumerate(gradients) for i, state in enumerate(states)}
    save_tensors(path, {**tensors, "behind": torch.tensor(behind, dtype=torch.int64, device=CPU)})


def _load(path: Path, count: int) -> tuple[int, list[States]] | None:
    """What `_save` kept; None where nothing is."""
    if not path.is_file():
        return None
    found = load_tensors(path)
    return int(found["behind"]), [tuple(found[f"{k}.{i}"] for i in range(count)) for k in range(DRAWS)]
