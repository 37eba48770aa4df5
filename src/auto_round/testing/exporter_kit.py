"""Conformance kit for exporters: any row of the table has to pass `check_exporter`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.export.exporter import Exporter
from auto_round.layouts.layout import TensorSpec
from auto_round.models.layer import Block, Layer, Role
from auto_round.numerics.format import Format
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.config_reader import FIELDS, fields_of
from auto_round.testing.failure import require
from auto_round.testing.slow_reader import PACKINGS, Stored, read_weight


@dataclass(frozen=True, slots=True)
class Case:
    """A small model and what is to become of it.

    Attributes:
        layers: matrices of the model.
        blocks: blocks of the model.
        plan: what becomes of each layer.
        tensors: everything in the source.
    """

    layers: tuple[Layer, ...]
    blocks: tuple[Block, ...]
    plan: Plan
    tensors: Mapping[str, TensorSpec]


def small_case(
    scheme: QuantizationScheme,
    *,
    head: QuantizationScheme | None = None,
    tied: bool = False,
    changes: Mapping[str, QuantizationScheme | None] | None = None,
) -> Case:
    """Two blocks of two matrices, a router in the second, a norm, an embedding and a head.

    Args:
        scheme: of all matrices but router and head.
        head: of the head; None keeps it.
        tied: the head shares the embedding.
        changes: layer name -> another scheme; None keeps that layer.
    """
    dtype = torch.bfloat16
    blocks = tuple(Block(i, f"model.layers.{i}", f"model.layers.{i}") for i in range(2))
    names = [(f"model.layers.{i}.mlp.{p}_proj", i, s) for i in range(2) for p, s in _PROJECTIONS.items()]
    layers = [Layer(n, f"{n}.weight", f"{n}.weight", s, dtype, i, Role.LINEAR) for n, i, s in names]
    router = "model.layers.1.mlp.gate"
    layers.append(Layer(router, f"{router}.weight", f"{router}.weight", (32, 64), dtype, 1, Role.ROUTER))
    embedding = "model.embed_tokens.weight"
    layers.append(
        Layer(
            "lm_head",
            embedding if tied else "lm_head.weight",
            "lm_head.weight",
            (96, 64),
            dtype,
            None,
            Role.HEAD,
        )
    )
    schemes = {layer.name: scheme for layer in layers} | {router: None, "lm_head": head} | dict(changes or {})
    plan = Plan(scheme, {name: PlanEntry(s, "asked") for name, s in schemes.items()})
    tensors = {embedding: TensorSpec(dtype, (96, 64))}
    tensors |= {layer.tensor: TensorSpec(dtype, layer.shape) for layer in layers}
    tensors["model.norm.weight"] = TensorSpec(dtype, (64,))
    return Case(tuple(layers), blocks, plan, tensors)


_PROJECTIONS = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}


def check_exporter(exporter: Exporter, case: Case, *, seed: int = 0) -> None:
    """Check every promise of an exporter for one plan.

    Raises:
        ConformanceError: a promise is broken: `encode` returns what `spec` says; names do not collide; the
            config is JSON, the same each time, and readers find each layer's scheme in it; and a reader that
            shares no code with the layouts finds the tuned weights in the stored tensors.
    """
    refusals = exporter.refusals(case.plan, case.layers)
    require(not refusals, f"{exporter.name} refuses: {[str(r) for r in refusals]}")
    exact = exporter.for_plan(case.plan, case.layers)
    require(exact.for_plan(case.plan, case.layers) == exact, f"{exporter.name}: for_plan is not settled")
    config = exact.config(case.plan, case.layers, case.blocks)
    require(
        config == exact.config(case.plan, case.layers, case.blocks),
        f"{exporter.name}: config differs on asking",
    )
    if config is not None:
        require(json.loads(json.dumps(config)) == config, f"{exporter.name}: config is not plain JSON")
        _check_config(exporter.name, config, case)
    taken: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    for layer in case.layers:
        fmt = case.plan.format_of(layer.name)
        if fmt is not None:
            names = _check_layer(exact, config, layer, fmt, generator)
            require(taken.isdisjoint(names), f"{exporter.name}: {layer.name} writes tensors of another layer")
            taken.update(names)


def _check_config(who: str, config: Mapping[str, Any], case: Case) -> None:
    for layer in case.layers:
        scheme = case.plan.entries[layer.name].scheme
        if scheme is None and layer.role is Role.HEAD:
            continue  # readers skip the head unless it is named
        want = None if scheme is None else {field: scheme[field] for field in FIELDS}
        for full_match in (False, True):
            got = fields_of(config, layer.name, full_match=full_match)
            got = got and {field: got[field] for field in FIELDS}
            require(got == want, f"{who}: readers take {layer.name} for {got}, the plan says {want}")


def _check_layer(
    exporter: Exporter,
    config: Mapping[str, Any] | None,
    layer: Layer,
    fmt: Format,
    generator: torch.Generator,
) -> Sequence[str]:
    q = fmt.quantize(torch.randn(layer.shape, generator=generator).to(layer.dtype))
    tensors = exporter.encode(layer, q)
    spec = exporter.spec(layer, fmt)
    where = f"{exporter.name} {layer.name}"
    require(list(tensors) == list(spec), f"{where}: encode gives {list(tensors)}, spec {list(spec)}")
    for name, tensor in tensors.items():
        require(
            (tensor.dtype, tuple(tensor.shape)) == (spec[name].dtype, tuple(spec[name].shape)),
            f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}, spec says {spec[name]}",
        )
    want = fmt.dequantize(q)
    if config is None:
        require(list(tensors) == [f"{layer.name}.weight"], f"{where}: a dense format keeps the weight's name")
        require(torch.equal(tensors[f"{layer.name}.weight"], want.to(layer.dtype)), f"{where}: other weights")
    else:
        require(torch.equal(_read(config, layer, tensors), want), f"{where}: a reader finds other weights")
    return list(tensors)


def _read(config: Mapping[str, Any], layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """Weight of a layer as someone finds it who has the folder only."""
    fields = fields_of(config, layer.name, full_match=False)
    require(fields is not None, f"readers of the config leave {layer.name} alone")
    found = fields or {}
    order, zero_offset = PACKINGS[config["packing_format"]]
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    return read_weight(parts, Stored(order, zero_offset, found["bits"], found["group_size"]), layer.shape)
