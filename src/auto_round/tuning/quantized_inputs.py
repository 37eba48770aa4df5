"""Quantized activations: the inputs of some modules are rounded while a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from auto_round.errors import ConfigError, nearest
from auto_round.numerics.activation import ActivationFormat


@contextmanager
def quantized_inputs(root: nn.Module, formats: Mapping[str, ActivationFormat]) -> Iterator[None]:
    """Round the first input of some modules; afterwards everything is as it was.

    Works under `torch.func.functional_call`, and leaves gradients to the formats.

    Args:
        root: any module.
        formats: dotted names of modules below `root` -> what their input `[..., in]` is rounded to.

    Raises:
        ConfigError: there is no such module.
    """
    modules = dict(root.named_modules())
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
