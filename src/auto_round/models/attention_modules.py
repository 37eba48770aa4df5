"""Attention modules of a model's blocks, found by what their source says."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.attention import Attention
from auto_round.facts.layer import Block
from auto_round.models.causal_attention import NAME
from auto_round.models.class_source import classes_of, tree_of

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Where Transformers looks up the function that multiplies queries, keys and values."""
_LATENT = "kv_lora_rank"
"""Setting of models whose caches hold latent vectors rather than keys and values."""


def find_attentions(
    model: nn.Module, blocks: Sequence[Block], disk_name: Callable[[str], str], dtype: torch.dtype
) -> tuple[Attention, ...]:
    """Attention modules whose queries, keys and values can be looked at, in the order of the blocks.

    Args:
        model: the model, its weights on any device.
        blocks: its blocks.
        disk_name: name on disk of a parameter.
        dtype: of the model.

    Raises:
        UnsupportedError: there are none, or some that keep something else than keys and values.
    """
    how = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if how != NAME:
        raise _cannot(f'the model computes its attention by itself ("{how}")')
    found = [each for block in blocks for each in _inside(model, block, disk_name, dtype)]
    if not found:
        raise _cannot("no block has an attention that asks Transformers for its function")
    return tuple(found)


def _inside(
    model: nn.Module, block: Block, disk_name: Callable[[str], str], dtype: torch.dtype
) -> Iterator[Attention]:
    for path, module in model.get_submodule(block.module).named_modules(prefix=block.module):
        if not any(_asks(kind) for kind in classes_of(module)):
            continue
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if getattr(config, _LATENT, None):
            raise _cannot(f"{path} keeps latent vectors ({_LATENT}), not keys and values")
        if not isinstance(heads, int) or not _takes_more(type(module)):
            raise _cannot(f"{path} cannot be looked into")
        layer = next((n for n, m in module.named_children() if isinstance(m, nn.Linear)), None)
        if layer is None:
            raise _cannot(f"{path} has no linear layers of its own")
        name = disk_name(f"{path}.{layer}.weight").rsplit(".", 2)[0]
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        yield Attention(name, path, block.index, heads, kv_heads, dtype)


@functools.cache
def _asks(kind: Any) -> bool:
    """Whether a class of attention takes its function from Transformers' table."""
    tree = tree_of(kind)
    return tree is not None and any(isinstance(n, ast.Name) and n.id == _INTERFACE for n in ast.walk(tree))


def _takes_more(kind: type[nn.Module]) -> bool:
    """Whether more arguments may be given, which are handed on to that function."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _cannot(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "the key/value cache of this model cannot be calibrated",
        [Refusal("attention", reason, "leave out static_kv_dtype and static_attention_dtype")],
    )
