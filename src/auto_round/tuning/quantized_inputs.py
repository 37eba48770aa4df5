"""Quantized activations: the inputs of some modules are rounded while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from auto_round.errors import ConfigError, nearest
from auto_round.facts.inputs import expert_of
from auto_round.models.matrix_experts import matrix_experts
from auto_round.numerics.activation import ActivationFormat


@contextmanager
def quantized_inputs(root: nn.Module, formats: Mapping[str, ActivationFormat]) -> Iterator[None]:
    """Round the first input of some modules, and what flows into experts; afterwards everything is as it was.

    Works under `torch.func.functional_call`, and leaves gradients to the formats.

    Args:
        root: any module.
        formats: names of inputs (`facts.inputs`) below `root` -> what they, `[..., in]`, are rounded to.

    Raises:
        ConfigError: there is no such module.
    """
    modules = dict(root.named_modules())
    experts: dict[str, dict[int, ActivationFormat]] = {}
    for name, fmt in formats.items():
        if (found := expert_of(name)) is not None:
            experts.setdefault(found[0], {})[found[1]] = fmt
    with ExitStack() as stack:
        for parameter, each in experts.items():
            owner = matrix_experts(root, parameter)
            if owner is None:
                raise ConfigError(f"inputs of the experts in {parameter} cannot be told apart")
            stack.enter_context(owner.rounding(parameter.rpartition(".")[2], each))
        stack.enter_context(_rounded(modules, {n: f for n, f in formats.items() if expert_of(n) is None}))
        yield


@contextmanager
def _rounded(modules: Mapping[str, nn.Module], formats: Mapping[str, ActivationFormat]) -> Iterator[None]:
    """The part of `quantized_inputs` that concerns modules."""
    if missing := [name for name in formats if name not in modules]:
        raise ConfigError(f'there is no module "{missing[0]}"; {nearest(missing[0], filter(None, modules))}')
    handles = [
        modules[name].register_forward_pre_hook(partial(_round, fmt), with_kwargs=True)
        for name, fmt in formats.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round(
    fmt: ActivationFormat, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del module
    if args:
        return (fmt.fake_quantize(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: fmt.fake_quantize(kwargs[first])}
