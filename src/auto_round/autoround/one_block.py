"""Quantize one block that somebody else runs: recorded calls in, rounded weights left in the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.autoround.recorded import Recorded, record, stack
from auto_round.calibration.observe import observe_inputs
from auto_round.config import Options
from auto_round.errors import ConfigError
from auto_round.facts.layer import Layer, Role
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.format import Format
from auto_round.numerics.token_weights import token_energy, token_weights
from auto_round.pipeline.activations import activation_formats
from auto_round.pipeline.device import choose_device
from auto_round.schemes.make import make_plan
from auto_round.schemes.request import plan_request
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.samples import Samples, run_block
from auto_round.tuning.settings import tune_settings
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.weights import WeightTask

HELD_OUT_SHARE = 8
"""One sample in so many is not trained on and chooses the step that is kept."""


def quantize_one_block(
    block: nn.Module,
    inputs: Sequence[Any] | Tensor,
    q_input: Sequence[Tensor] | Tensor | None,
    options: Options,
    device: str | torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Tune and round a block in place; arguments and result as in `AutoRound.quantize_block`."""
    if options.tune.enable_alg_ext:
        raise ConfigError(
            "enable_alg_ext judges the last block by the model's predictions, and a block alone has none: "
            "leave it out for quantize_block"
        )
    recorded = record(inputs)
    home = next(block.parameters()).device
    where = home if device is None else choose_device(str(device))
    block.to(where)
    try:
        return _quantize(block, recorded, None if q_input is None else stack(q_input), options, where)
    finally:
        block.to(home)


def _quantize(
    block: nn.Module, recorded: Recorded, q_input: Tensor | None, options: Options, device: torch.device
) -> tuple[Tensor, Tensor]:
    def samples(hidden: Tensor, targets: Tensor, index: Sequence[int]) -> Samples:
        wanted = targets[list(index)]
        return Samples(
            hidden[list(index)],
            wanted,
            lambda rows: recorded.arguments([index[i] for i in rows], device),
            token_weights(token_energy(wanted)),
        )

    def run(hidden: Tensor) -> Tensor:
        result = torch.empty_like(hidden)
        everything = samples(hidden, hidden, range(len(recorded)))
        run_block(block, everything, result, batch_size=options.tune.batch_size, device=device)
        return result

    formats, activations = _formats(block, options)
    with observe_inputs(block, [name.removesuffix(".weight") for name in formats]) as seen:
        out = run(recorded.hidden)
    q_hidden = recorded.hidden if q_input is None else q_input
    hidden = q_hidden if options.tune.enable_quanted_input else recorded.hidden
    generator = torch.Generator()
    generator.manual_seed(options.calibration.seed)
    order = torch.randperm(len(recorded), generator=generator, device="cpu").tolist()
    share = len(order) // HELD_OUT_SHARE
    with quantized_inputs(block, activations):
        tuned = tune_block(
            block,
            {
                name: WeightTask(
                    fmt, block.get_parameter(name).detach(), seen[name.removesuffix(".weight")].importance()
                )
                for name, fmt in formats.items()
            },
            samples(hidden, out, order[share:]),
            samples(hidden, out, order[:share] or order),
            tune_settings(options.tune, min((f.grid.bits for f in formats.values()), default=16)),
            generator=generator,
        )
        with torch.no_grad():
            for name, q in tuned.weights.items():
                block.get_parameter(name).copy_(q.format.dequantize(q))
            for name, value in tuned.others.items():
                block.get_parameter(name).copy_(value)
        return run(q_hidden), out


def _formats(
    block: nn.Module, options: Options
) -> tuple[Mapping[str, Format], Mapping[str, ActivationFormat]]:
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
