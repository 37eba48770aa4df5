"""Fused experts that run matrix by matrix: whoever has their weights in another form gives one at a time.

A block of 128 experts has 600 million weights and more. A copy of them in the dtype in which the block
computes, one as they are rounded, and what a grouped product forms of both, take ten times the memory of the
model itself. Here only the matrix at hand exists in full (`expert_products`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.errors import InternalError, UnsupportedError
from auto_round.models.expert_products import (
    Matrices,
    OwnMatrices,
    product,
    product_of_stack,
    rounded_tokens,
)
from auto_round.models.experts import ExpertCall, ExpertParts, between, read_call
from auto_round.models.fused import transposed_parts
from auto_round.numerics.activation import ActivationFormat

_SAID = ("config", "has_gate", "has_bias", "has_post_expert_norm", "num_experts")
"""What such a module says of itself (`models.experts`)."""


class MatrixExperts(nn.Module):
    """Stands in for a module of fused experts in a model of ours; parameters have the same names.

    Their matrices always are `[n_experts, out, in]`. They may stay in the dtype of the model while the block
    computes in another one (`keep`).
    """

    def __init__(self, fused: nn.Module, parts: ExpertParts) -> None:
        """Take the place of `fused`, whose parameters are shared.

        Args:
            fused: the module of experts.
            parts: of it; the module keeps them as `[n_experts, in, out]` where it says nothing of that.
        """
        super().__init__()
        self._parts = parts
        self._transposed = bool(vars(fused).get("is_transposed", True))
        self.by_matrix = ExpertParts.of(fused) is not None
        self._given: dict[str, Matrices] = {}
        self._inputs: dict[str, Mapping[int, ActivationFormat]] = {}
        self._kept: torch.dtype | None = None
        self.is_transposed = False
        for name in _SAID:
            if name in vars(fused):
                setattr(self, name, vars(fused)[name])
        for name, parameter in fused.named_parameters(recurse=False):
            turn = self._transposed and name in self.matrices
            # One of its own: when this module goes to another device, nobody else holds the weights.
            own = _turned(parameter) if turn else parameter.detach()
            self.register_parameter(name, nn.Parameter(own, requires_grad=False))
        for name, buffer in fused.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.train(fused.training)
        # In a tuple, or its parameters would be there twice; last, for `__getattr__` asks it.
        self._fused = (fused,)

    def __getattr__(self, name: str) -> Any:
        """What the module has beside parameters: code around it may ask for it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fused" not in self.__dict__:
                raise
            return getattr(self._fused[0], name)

    @property
    def parts(self) -> ExpertParts:
        """Names of the parameters that hold a matrix for each expert, and how many there are."""
        return self._parts

    @property
    def matrices(self) -> tuple[str, str]:
        """Names of the parameters that hold a matrix for each expert."""
        return self._parts.up, self._parts.down

    @property
    def turned(self) -> tuple[str, ...]:
        """Those that the model keeps as `[n_experts, in, out]`."""
        return self.matrices if self._transposed else ()

    def part(self, share: Sequence[int]) -> MatrixExperts:
        """A module with some of the experts, numbered in this order; weights are copied.

        What follows the second product is left out: it is that of all experts.
        """
        memo: dict[int, object] = {id(x): x for x in [vars(self).get("config")] if x is not None}
        for own in self.parameters(recurse=False):
            of_share = own.detach()[torch.tensor(share, dtype=torch.int64, device=own.device)]
            memo[id(own)] = nn.Parameter(of_share, requires_grad=False)
        found = copy.deepcopy(self, memo)
        found._parts = replace(self._parts, count=len(share))
        for said in (found, found._fused[0]):
            cast("Any", said).num_experts, cast("Any", said).has_post_expert_norm = len(share), False
        for name, _ in self.named_children():
            delattr(found, name)
        return found

    def keep(self, dtype: torch.dtype) -> None:
        """Leave the matrices in their dtype: the block computes in another one."""
        self._kept = dtype

    def computes_in(self, name: str) -> torch.dtype:
        """Dtype in which one of its parameters is multiplied."""
        own = self._value(name).dtype
        return own if self._kept is None or name not in self.matrices else self._kept

    @contextmanager
    def using(self, name: str, matrices: Matrices) -> Iterator[None]:
        """Multiply by other matrices in place of a parameter's, while the context lasts."""
        self._given[name] = matrices
        try:
            yield
        finally:
            del self._given[name]

    @contextmanager
    def rounding(self, name: str, formats: Mapping[int, ActivationFormat]) -> Iterator[None]:
        """Round what flows into the matrices of a parameter, while the context lasts.

        Args:
            name: of the parameter.
            formats: expert -> what its tokens `[n, in]` are rounded to; others are left alone.
        """
        self._inputs[name] = formats
        try:
            yield
        finally:
            del self._inputs[name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the fused module gives, `[tokens, width]`.

        Raises:
            UnsupportedError: inputs are to be rounded, and the module is called in an unusual way.
        """
        call = read_call(args, kwargs)
        if call is None and self._inputs:
            raise UnsupportedError("experts with rounded inputs take hidden states, indices and weights")
        if call is None or not (self._given or self._inputs or self._by_matrix(call.hidden)):
            return self._as_written(args, kwargs)
        up, down = (self._given.get(name) or OwnMatrices(self._value(name)) for name in self.matrices)
        return self._run(call, up, down)

    def _value(self, name: str) -> Tensor:
        """A parameter, or the tensor that is substituted for it."""
        value: Tensor = getattr(self, name)
        return value

    def _by_matrix(self, hidden: Tensor) -> bool:
        """On processors, where grouped products copy all matrices; not for gradients of whole parameters."""
        wanted = any(self._value(name).requires_grad for name in self.matrices)
        return hidden.device.type == "cpu" and not wanted

    def _as_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward."""
        values: dict[str, Tensor] = {}
        for name, value in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            cast = value.to(self.computes_in(name)) if name in self.matrices else value
            values[name] = cast.transpose(-2, -1) if name in self.turned else cast
        return functional_call(self._fused[0], values, args, kwargs)

    def _run(self, call: ExpertCall, up: Matrices, down: Matrices) -> Tensor:
        count, k = self._parts.count, call.chosen.shape[-1]
        # As Transformers calls it: tokens of an expert are added in the order in which they stand.
        experts, order = torch.sort(call.chosen.reshape(-1))
        ends = torch.bincount(experts.clamp_max(count), minlength=count + 1)[:count].cumsum(0).tolist()
        inner = self._product(call.hidden[order // k], self._parts.up, up, experts, ends)
        found = self._product(between(self._fused[0], inner), self._parts.down, down, experts, ends)
        if vars(self).get("has_post_expert_norm"):
            found = self._fused[0].post_expert_norm(found)  # type: ignore[operator]
        found = found * call.weights.reshape(-1)[order].unsqueeze(-1)
        if ends[-1] < len(found):  # a number behind the last expert stands for none
            found = torch.cat([found[: ends[-1]], torch.zeros_like(found[ends[-1] :])])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return found[back].view(len(call.hidden), k, -1).sum(dim=1).to(call.hidden.dtype)

    def _product(
        self, x: Tensor, name: str, matrices: Matrices, experts: Tensor, ends: Sequence[int]
    ) -> Tensor:
        if name in self._inputs:
            x = rounded_tokens(x, self._inputs[name], ends)
        made: Tensor
        if isinstance(matrices, OwnMatrices) and matrices.stack.requires_grad and torch.is_grad_enabled():
            made = product_of_stack(x, matrices.stack, ends)
        else:
            made = product(x, matrices, ends, turned=self._transposed)
        if not vars(self).get("has_bias"):
            return made
        bias = self._value(f"{name}_bias")
        return made.add_(bias[experts.clamp_max(len(bias) - 1)])


def _turned(stack: Tensor) -> Tensor:
    return stack.detach().transpose(-2, -1).contiguous()


def install(model: nn.Module) -> frozenset[str]:
    """Replace the fused experts of a skeleton whose modules say how they compute, in place.

    Returns:
        Names of parameters that the model itself keeps the other way round.
    """
    turned = []
    for path, module in list(model.named_modules()):
        parts = ExpertParts.of(module) or transposed_parts(module)
        if parts is None or isinstance(module, MatrixExperts):
            continue
        stand_in = MatrixExperts(module, parts)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, stand_in)
        turned += [f"{path}.{name}" for name in stand_in.turned]
    return frozenset(turned)


def matrix_experts(block: nn.Module, parameter: str) -> MatrixExperts | None:
    """The module that multiplies by the matrices of a parameter one at a time; None for other parameters."""
    path, _, name = parameter.rpartition(".")
    owner = block.get_submodule(path)
    if not isinstance(owner, MatrixExperts) or not owner.by_matrix or name not in owner.matrices:
        return None
    return owner


def computes_in(block: nn.Module, parameter: str) -> torch.dtype:
    """Dtype in which a block multiplies by one of its parameters."""
    owner = matrix_experts(block, parameter)
    return (
        block.get_parameter(parameter).dtype
        if owner is None
        else owner.computes_in(parameter.rpartition(".")[2])
    )


@contextmanager
def using(block: nn.Module, matrices: Mapping[str, Matrices]) -> Iterator[None]:
    """Multiply by other matrices in place of some parameters', while the context lasts.

    Args:
        block: any module that holds `MatrixExperts`.
        matrices: parameter -> what stands in for it.
    """
    with ExitStack() as stack:
        for parameter, each in matrices.items():
            owner = matrix_experts(block, parameter)
            if owner is None:
                raise InternalError(f"{parameter} is not multiplied matrix by matrix")
            stack.enter_context(owner.using(parameter.rpartition(".")[2], each))
        yield
