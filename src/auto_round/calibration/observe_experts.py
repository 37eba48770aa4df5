"""What reaches each expert: how many tokens, and what flows into its matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.calibration.observe import InputExtremes, InputMoments, MaskOf, observe_extremes
from auto_round.errors import NumericsError
from auto_round.facts.inputs import expert_of
from auto_round.facts.tensor import STACK
from auto_round.models.divided_experts import DividedExperts, name_in_piece
from auto_round.models.experts import (
    ExpertCall,
    ExpertParts,
    between,
    chosen_experts,
    multiply_by,
    read_call,
    rows_of_experts,
)
from auto_round.numerics.importance import StackImportance
from auto_round.numerics.token_weights import token_energy, token_weights


class ExpertMoments:
    """Second moments of the inputs of one parameter of fused experts, each over its own expert's tokens.

    Attributes:
        experts: the sums of each expert.
    """

    def __init__(self, experts: Sequence[InputMoments]) -> None:
        self.experts = tuple(experts)

    def matrix(self, index: int) -> InputMoments:
        """The sums of one expert."""
        return self.experts[index]

    def importance(self) -> StackImportance | None:
        """Importance for each expert, None for one without tokens; None where no expert was looked into.

        Raises:
            NumericsError: an activation was not finite.
        """
        found = []
        for number, moments in enumerate(self.experts):
            try:
                found.append(moments.importance())
            except NumericsError as error:
                raise NumericsError(f"expert {number}: {error}") from None
        return StackImportance(tuple(found)) if any(each is not None for each in found) else None


@dataclass(frozen=True, slots=True)
class SeenExperts:
    """What reached the experts of a block.

    Attributes:
        tokens: module -> tokens that reached each expert, `[n_experts] int64`.
        moments: parameter -> what flowed into each expert's matrix, for those that were asked for.
    """

    tokens: Mapping[str, Tensor]
    moments: Mapping[str, ExpertMoments]


@dataclass(frozen=True, slots=True)
class _Experts:
    """A module of experts, whole or cut into pieces.

    Attributes:
        module: the module.
        count: how many experts it has.
        parts: how it computes; None where that is not known.
        shares: parameter of the whole module -> its own name, or those of its pieces -> their experts.
        products: gives what multiplies by an expert's first matrix, and what lies between the two products;
            asked where `parts` is known.
    """

    module: nn.Module
    count: int
    parts: ExpertParts | None
    shares: Mapping[str, Mapping[str, Sequence[int]]]
    products: Callable[[str], tuple[Callable[[int, Tensor], Tensor], Callable[[Tensor], Tensor]]]

    @classmethod
    def of(cls, module: nn.Module) -> _Experts | None:
        """What a module holds of experts itself; None for any other module."""
        if isinstance(module, DividedExperts):
            parts = module.parts
            pieces = {
                own: {name_in_piece(own, i): share for i, share in enumerate(module.shares)}
                for own in (parts.up, parts.down)
            }
            return cls(
                module, parts.count, parts, pieces, lambda up: (module.multiply_by(up), module.between)
            )
        stacks = {n: len(p) for n, p in module.named_parameters(recurse=False) if p.dim() == STACK}
        if not stacks:
            return None
        count = max(stacks.values())
        shares = {own: {own: range(count)} for own in stacks}
        return cls(
            module,
            count,
            ExpertParts.of(module),
            shares,
            lambda up: (multiply_by(module, up), partial(between, module)),
        )


@dataclass(frozen=True, slots=True)
class _Watch:
    """Looks at the calls of one module of experts.

    Attributes:
        tokens: counts, `[n_experts] int64`.
        experts: the module.
        moments: own parameter -> sums.
        rows_of: asked at each call for the number of rows of the batch that is running.
        mask_of: asked for its mask, `[batch, tokens] bool`.
    """

    tokens: Tensor
    experts: _Experts
    moments: Mapping[str, ExpertMoments]
    rows_of: Callable[[], int]
    mask_of: MaskOf | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = chosen_experts(args, kwargs)
        if chosen is None:
            return
        mask = self._mask(len(chosen), chosen.device)
        seen = (chosen if mask is None else chosen[mask.reshape(-1)]).reshape(-1).cpu()
        count = len(self.tokens)
        # An index behind the last expert stands for none.
        self.tokens.add_(torch.bincount(seen, minlength=count)[:count])
        call = read_call(args, kwargs)
        if self.moments and self.experts.parts is not None and call is not None:
            with torch.no_grad():
                self._measure(call, self.experts.parts, mask)

    def _mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Tokens that count, `[rows, length]`; None where all do, or where other tokens run."""
        mask = None if self.mask_of is None else self.mask_of()
        return mask.to(device) if mask is not None and mask.numel() == tokens else None

    def _measure(self, call: ExpertCall, parts: ExpertParts, mask: Tensor | None) -> None:
        k, hidden = call.chosen.shape[-1], call.hidden
        every = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        counted = every if mask is None else mask.reshape(-1)
        groups = [(e, at[counted[at // k]]) for e, at in rows_of_experts(call.chosen, parts.count)]
        if parts.up in self.moments:
            weights = self._weights(token_energy(hidden), counted)
            for expert, at in groups:
                if len(at):
                    moments = self.moments[parts.up].experts[expert]
                    moments.add_tokens(hidden[at // k], weights[at // k])
        if parts.down in self.moments:
            self._measure_inner(call, parts, groups)

    def _measure_inner(self, call: ExpertCall, parts: ExpertParts, groups: list[tuple[int, Tensor]]) -> None:
        """What flows between the two products, which the module keeps to itself: computed once more."""
        k = call.chosen.shape[-1]
        up, gated = self.experts.products(parts.up)
        inner = [gated(up(expert, call.hidden[at // k])) for expert, at in groups]
        energy = torch.zeros(call.chosen.numel(), dtype=torch.float32, device=call.hidden.device)
        counted = torch.zeros_like(energy, dtype=torch.bool)
        for (_, at), x in zip(groups, inner, strict=True):
            energy[at], counted[at] = token_energy(x), True
        weights = self._weights(energy, counted)
        for (expert, at), x in zip(groups, inner, strict=True):
            if len(at):
                self.moments[parts.down].experts[expert].add_tokens(x, weights[at])

    def _weights(self, energy: Tensor, counted: Tensor) -> Tensor:
        """`token_weights` of each of the batch's rows by itself."""
        rows = self.rows_of()
        rows = rows if rows and len(energy) % rows == 0 else 1
        return token_weights(energy.reshape(rows, -1), counted.reshape(rows, -1)).reshape(-1)


@dataclass(frozen=True, slots=True)
class _Range:
    """Looks at the range of what flows into each expert of one module.

    Attributes:
        parts: how the module computes.
        extremes: own parameter -> expert -> what was seen.
        mask_of: asked for the mask of the batch that is running, `[batch, tokens] bool`.
    """

    parts: ExpertParts
    extremes: Mapping[str, Mapping[int, InputExtremes]]
    mask_of: MaskOf | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = read_call(args, kwargs)
        if call is None:
            return
        mask, k = None if self.mask_of is None else self.mask_of(), call.chosen.shape[-1]
        counted = None if mask is None or mask.numel() != len(call.hidden) else mask.reshape(-1)
        up, down = (self.extremes.get(name, {}) for name in (self.parts.up, self.parts.down))
        first = multiply_by(module, self.parts.up)
        with torch.no_grad():
            for expert, at in rows_of_experts(call.chosen, self.parts.count):
                rows = at // k
                x = call.hidden[rows if counted is None else rows[counted.to(rows.device)[rows]]]
                if expert in up:
                    up[expert].add(x)
                if expert in down and len(x):
                    down[expert].add(between(module, first(expert, x)))


@contextmanager
def observe_expert_extremes(
    block: nn.Module, inputs: Collection[str], mask_of: MaskOf | None = None, percentile: float = 100.0
) -> Iterator[Mapping[str, InputExtremes]]:
    """The range of what flows into some experts, while the context lasts.

    Args:
        block: any module; it is left as it was.
        inputs: names of experts' inputs (`facts.inputs`).
        mask_of: as for `observe_experts`.
        percentile: as for `InputExtremes`.

    Yields:
        name -> its range, filled by running the block; without a token for modules that do not say how they
        compute.
    """
    found = {name: InputExtremes(percentile) for name in inputs}
    modules: dict[str, dict[str, dict[int, InputExtremes]]] = {}
    for name, extremes in found.items():
        parameter, expert = expert_of(name) or (name, 0)
        path, _, own = parameter.rpartition(".")
        modules.setdefault(path, {}).setdefault(own, {})[expert] = extremes
    handles = []
    for path, seen in modules.items():
        module = block.get_submodule(path)
        parts = ExpertParts.of(module)
        if parts is not None:
            watch = _Range(parts, seen, mask_of)
            handles.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe_ranges(
    block: nn.Module, inputs: Collection[str], mask_of: MaskOf | None = None, percentile: float = 100.0
) -> Iterator[Mapping[str, InputExtremes]]:
    """The range of what flows into modules and into experts, while the context lasts.

    Args:
        block: any module; it is left as it was.
        inputs: names of inputs (`facts.inputs`), of both kinds.
        mask_of: as for `observe_experts`.
        percentile: as for `InputExtremes`.
    """
    of_modules = [name for name in inputs if expert_of(name) is None]
    of_experts = [name for name in inputs if expert_of(name) is not None]
    with (
        observe_extremes(block, of_modules, mask_of, percentile) as extremes,
        observe_expert_extremes(block, of_experts, mask_of, percentile) as each,
    ):
        yield {**extremes, **each}


def _one() -> int:
    return 1


@contextmanager
def observe_experts(
    block: nn.Module,
    mask_of: MaskOf | None = None,
    rows_of: Callable[[], int] = _one,
    measured: Collection[str] = (),
) -> Iterator[SeenExperts]:
    """Count the tokens of each expert, and measure what flows into its matrices, while the context lasts.

    Args:
        block: any module; it is left as it was.
        mask_of: asked at each call for the mask of the batch that is running, `[batch, tokens] bool`.
        rows_of: asked at each call for the number of rows of that batch.
        measured: names of parameters of fused experts whose inputs are measured. Those of a module that does
            not say how it computes stay without a token.

    Yields:
        What was seen, filled by running the block.
    """
    tokens: dict[str, Tensor] = {}
    moments: dict[str, ExpertMoments] = {}
    handles = []
    for name, experts in _modules_of_experts(block):
        prefix = f"{name}." if name else ""
        own: dict[str, ExpertMoments] = {}
        for parameter, shares in experts.shares.items():
            names = [n for n in shares if f"{prefix}{n}" in measured]
            if names:
                own[parameter] = ExpertMoments([InputMoments() for _ in range(experts.count)])
                each = own[parameter].experts
                moments |= {f"{prefix}{n}": ExpertMoments([each[e] for e in shares[n]]) for n in names}
        tokens[name] = torch.zeros(experts.count, dtype=torch.int64, device="cpu")
        watch = _Watch(tokens[name], experts, own, rows_of, mask_of)
        handles.append(experts.module.register_forward_pre_hook(watch, with_kwargs=True))
    try:
        yield SeenExperts(tokens, moments)
    finally:
        for handle in handles:
            handle.remove()


def _modules_of_experts(block: nn.Module) -> Iterator[tuple[str, _Experts]]:
    """Modules that hold experts, by their names; one that is cut into pieces as a whole."""
    inside = tuple(f"{n}." for n, module in block.named_modules() if isinstance(module, DividedExperts))
    for name, module in block.named_modules():
        if not name.startswith(inside) and (found := _Experts.of(module)) is not None:
            yield name, found
