"""Tables for families whose blocks are not one plain list: what their modules do not say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from auto_round.facts.flow import HIDDEN_STATES, Flow

LISTS: Mapping[str, tuple[str, ...]] = {
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "Flux2Transformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "ZImageTransformer2DModel": ("noise_refiner", "context_refiner", "layers"),
    "WanTransformer3DModel": ("blocks",),
    "UNet2DConditionModel": (
        "down_blocks.*.attentions.*.transformer_blocks",
        "mid_block.attentions.*.transformer_blocks",
        "up_blocks.*.attentions.*.transformer_blocks",
    ),
}
"""Class name of a model with several lists of blocks -> their module paths in order of execution; `*` stands
for every number in turn. Models of diffusers have a row in any case: they do not say what is a block."""

_IMAGE_AND_TEXT = ("hidden_states", "encoder_hidden_states")
_TEXT_FIRST = Flow(_IMAGE_AND_TEXT, returned=_IMAGE_AND_TEXT[::-1])

FLOWS: Mapping[str, Flow] = {
    "FluxTransformerBlock": _TEXT_FIRST,
    "FluxSingleTransformerBlock": _TEXT_FIRST,
    "Flux2TransformerBlock": _TEXT_FIRST,
    "JointTransformerBlock": _TEXT_FIRST,
    "QwenImageTransformerBlock": _TEXT_FIRST,
    "T5Block": Flow(("hidden_states",), ("hidden_states",), settled=2),  # position biases
}
"""Class name of a block that hands on several tensors -> which parameters receive them, and their order in
its output. All blocks of a list hand on equally many; the last may give None for what nobody reads.
Source: `models/transformers` of diffusers 0.42."""
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def flow_of(block: nn.Module) -> Flow:
    """What a block takes from the block before it: its first parameter, unless `FLOWS` has its class."""
    first = next(iter(inspect.signature(block.forward).parameters.values()), None)
    if type(block).__name__ in FLOWS:
        return FLOWS[type(block).__name__]
    if first is None or first.kind in _ANY:
        return HIDDEN_STATES
    return Flow((first.name,), (first.name,))


def parameter_names(block: nn.Module) -> tuple[str, ...]:
    """Names of what a block's forward takes, in order."""
    return tuple(inspect.signature(block.forward).parameters)
