"""Quantize one block that somebody else runs: recorded calls in, rounded weights left in the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.autoround.recorded import Recorded, record, stack
from auto_round.config import Options
from auto_round.errors import ConfigError
from auto_round.facts.flow import States
from auto_round.facts.layer import Layer, Role
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.fetch_rows import HELD_OUT_SHARE
from auto_round.pipeline.machine.device import choose_device
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.streams import Streams
from auto_round.pipeline.running.unit import Unit, tune_unit
from auto_round.schemes.make import make_plan
from auto_round.schemes.request import plan_request
from auto_round.tuning.settings import tune_settings

BY_PREDICTIONS = {"enable_alg_ext": "judges the last block", "distill_steps": "tunes all blocks together"}
"""Options that need the whole model."""


def quantize_one_block(
    block: nn.Module,
    inputs: Sequence[Any] | Tensor,
    q_input: Sequence[Tensor | States] | Tensor | None,
    options: Options,
    device: str | torch.device | None,
) -> tuple[States, States]:
    """Tune and round a block in place; arguments and result as in `AutoRound.quantize_block`."""
    for name, does in BY_PREDICTIONS.items():
        if getattr(options.tune, name):
            raise ConfigError(
                f"{name} {does} by the model's predictions, and a block alone has none: "
                "leave it out for quantize_block"
            )
    recorded = record(block, inputs)
    home = next(block.parameters()).device
    where = home if device is None else choose_device(str(device))
    block.to(where)
    try:
        quantized = recorded.states if q_input is None else stack(q_input)
        return _quantize(block, recorded, quantized, options, where)
    finally:
        block.to(home)


def _quantize(
    block: nn.Module, recorded: Recorded, quantized: States, options: Options, device: torch.device
) -> tuple[States, States]:
    """Outputs of the quantized block for `quantized`, and of the original one for what was recorded."""
    generator = torch.Generator().manual_seed(options.calibration.seed)
    order = torch.randperm(len(recorded), generator=generator, device="cpu").tolist()
    share = len(order) // HELD_OUT_SHARE
    order = order[share:] + order[:share]  # those that are held out stand last
    unit = _unit(block, recorded, order, options, device)
    streams = Streams(
        tuple(x[order] for x in recorded.states),
        tuple(x[order] for x in quantized),
        tuple(torch.empty_like(x) for x in recorded.states),
        len(order) - share,
    )
    bits = min((fmt.grid.bits for fmt in unit.formats.values()), default=16)
    tuned = tune_unit(
        unit,
        streams,
        tune_settings(options.tune, bits),
        generator=generator,
        from_quantized=options.tune.enable_quanted_input,
    )
    with torch.no_grad():
        for name, value in tuned.parameters.items():
            unit.group.get_parameter(name).copy_(value)
    back = torch.tensor(order, dtype=torch.int64, device="cpu").argsort()
    after, before = (tuple(x[back] for x in states) for states in (streams.quantized, streams.reference))
    return after, before


def _unit(
    block: nn.Module, recorded: Recorded, order: Sequence[int], options: Options, device: torch.device
) -> Unit:
    """The block as a group of one."""
    formats, activations = _formats(block, options)
    group = BlockGroup([block], [recorded.flow])
    return Unit(
        group=group,
        originals={f"0.{name}": block.get_parameter(name).detach() for name in formats},
        formats={f"0.{name}": fmt for name, fmt in formats.items()},
        activations={f"0.{name}": fmt for name, fmt in activations.items()},
        observed=[f"0.{name.removesuffix('.weight')}" for name in formats],
        table=recorded.table(order),
        blocks=(0,),
        device=device,
        percentile=options.calibration.act_percentile,
    )


def _formats(block: nn.Module, options: Options) -> tuple[Mapping[str, Format], Mapping[str, InputFormat]]:
    """Formats of the block's linear weights by parameter, and of their inputs by module.

    Names in rules are those inside the block.
    """
    layers = [
        Layer(
            name,
            f"{name}.weight",
            f"{name}.weight",
            (module.out_features, module.in_features),
            module.weight.dtype,
            0,
            Role.LINEAR,
        )
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    request = replace(plan_request(options.scheme), quant_lm_head=False, to_quant_block_names=None)
    plan = make_plan(layers, request, other_names=[name for name, _ in block.named_modules()])
    found = {layer.parameter: plan.format_of(layer.name) for layer in layers}
    formats = {name: fmt for name, fmt in found.items() if fmt is not None}
    return formats, activation_formats(plan, layers)
