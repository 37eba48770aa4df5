"""Conformance kit for exporters: any row of the table has to pass `check_exporter`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.export.exporter import Exporter
from auto_round.facts.layer import Block, Layer, Role
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing import compressed_reader
from auto_round.testing.config_reader import FIELDS, MERGING, READERS, Found, Reader, merged_names
from auto_round.testing.failure import require
from auto_round.testing.slow_reader import PACKINGS, StoredAs, read_weight


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
    router: str = "gate",
) -> Case:
    """Two blocks of three matrices, a router in the second, a norm, an embedding and a head.

    Args:
        scheme: of all matrices but router and head.
        head: of the head; None keeps it.
        tied: the head shares the embedding.
        changes: layer name -> another scheme; None keeps that layer.
        router: last component of the router's name; the usual one begins that of a matrix beside it.
    """
    matrices = [
        _matrix(f"model.layers.{i}.mlp.{p}_proj", i, shape) for i in range(2) for p, shape in _MLP.items()
    ]
    gate = _matrix(f"model.layers.1.mlp.{router}", 1, (32, 64), Role.ROUTER)
    last = _matrix("lm_head", None, (96, 64), Role.HEAD)
    layers = [*matrices, gate, replace(last, tensor=_EMBEDDING) if tied else last]
    return _case(layers, scheme, {gate.name: None, "lm_head": head, **(changes or {})})


def expert_case(
    scheme: QuantizationScheme,
    *,
    experts: QuantizationScheme | None,
    changes: Mapping[str, QuantizationScheme | None] | None = None,
) -> Case:
    """A block with a plain MLP and one with a router and two experts, both with attention and its biases.

    Args:
        scheme: of all matrices but experts, router and head.
        experts: of the experts; None keeps them.
        changes: layer name -> another scheme; None keeps that layer.
    """
    layers = [_matrix(f"model.layers.{i}.self_attn.{p}_proj", i, (64, 64)) for i in range(2) for p in "qkvo"]
    layers += [_matrix(f"model.layers.0.mlp.{p}_proj", 0, shape) for p, shape in _MLP.items()]
    layers += [
        replace(
            _matrix(f"model.layers.1.mlp.experts.{e}.{p}_proj", 1, shape, Role.EXPERT),
            parameter=f"model.layers.1.mlp.experts.{'down_proj' if p == 'down' else 'gate_up_proj'}",
            expert=e,
        )
        for e in range(2)
        for p, shape in _MLP.items()
    ]
    gate = _matrix("model.layers.1.mlp.gate", 1, (32, 64), Role.ROUTER)
    layers += [gate, _matrix("lm_head", None, (96, 64), Role.HEAD)]
    own = {layer.name: experts for layer in layers if layer.role is Role.EXPERT}
    return _case(layers, scheme, {**own, gate.name: None, "lm_head": None, **(changes or {})})


_MLP = {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
_EMBEDDING = "model.embed_tokens.weight"
_DTYPE = torch.bfloat16


def _matrix(name: str, block: int | None, shape: tuple[int, int], role: Role = Role.LINEAR) -> Layer:
    return Layer(name, f"{name}.weight", f"{name}.weight", shape, _DTYPE, block, role)


def _case(
    layers: Sequence[Layer], scheme: QuantizationScheme, changes: Mapping[str, QuantizationScheme | None]
) -> Case:
    blocks = tuple(Block(i, f"model.layers.{i}", f"model.layers.{i}") for i in range(2))
    schemes = {layer.name: scheme for layer in layers} | dict(changes)
    plan = Plan(scheme, {name: PlanEntry(s, "asked") for name, s in schemes.items()})
    tensors = {_EMBEDDING: TensorSpec(_DTYPE, (96, 64))}
    tensors |= {layer.tensor: TensorSpec(_DTYPE, layer.shape) for layer in layers}
    tensors |= {
        f"{layer.name}.bias": TensorSpec(_DTYPE, layer.shape[:1])
        for layer in layers
        if layer.name.endswith("q_proj")
    }
    tensors["model.norm.weight"] = TensorSpec(_DTYPE, (64,))
    return Case(tuple(layers), blocks, plan, tensors)


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
        _check_config(exporter.name, config, case, _packed(exact, case))
    taken: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    for layer in case.layers:
        fmt = case.plan.format_of(layer.name)
        if fmt is not None:
            names = _check_layer(exact, config, layer, fmt, generator, _packed(exact, case))
            require(taken.isdisjoint(names), f"{exporter.name}: {layer.name} writes tensors of another layer")
            taken.update(names)


def _packed(exporter: Exporter, case: Case) -> set[str]:
    """Names of the layers that get packed tensors."""
    listed = [(layer, case.plan.format_of(layer.name)) for layer in case.layers]
    return {layer.name for layer, fmt in listed if fmt is not None and len(exporter.spec(layer, fmt)) > 1}


def _check_config(who: str, config: Mapping[str, Any], case: Case, packed: Collection[str]) -> None:
    schemes = {layer.name: case.plan.entries[layer.name].scheme for layer in case.layers}
    method = config["quant_method"]
    require(method in READERS, f"{who}: no reader here knows quant_method {method}")
    for reader, read in READERS[method].items():
        for layer in case.layers:
            if layer.role is Role.HEAD and schemes[layer.name] is None and method == "auto-round":
                continue  # readers skip the head unless it is named
            _check_fields(f"{who}: {reader}", read, config, layer.name, schemes[layer.name], packed)
        if reader in (MERGING if method != "auto-round" else MERGING[:1]):
            for merged, members in merged_names(schemes).items():
                if all(schemes[member] == schemes[members[0]] for member in members):
                    _check_fields(f"{who}: {reader}", read, config, merged, schemes[members[0]], packed)


def _check_fields(
    who: str,
    read: Reader,
    config: Mapping[str, Any],
    name: str,
    scheme: QuantizationScheme | None,
    packed: Collection[str],
) -> None:
    got: Found = read(config, name, packed)
    got = got and {field: got[field] for field in FIELDS if field in got}
    want = None if scheme is None else {field: scheme[field] for field in got or ("bits",)}
    if want is not None and config.get("packing_format") == "auto_round:auto_awq":
        want["sym"] = False  # zero points are always stored
    require(got == want, f"{who} takes {name} for {got}, the plan says {want}")


def _check_layer(
    exporter: Exporter,
    config: Mapping[str, Any] | None,
    layer: Layer,
    fmt: Format,
    generator: torch.Generator,
    packed: Collection[str],
) -> Sequence[str]:
    q = fmt.quantize(torch.randn(layer.shape, generator=generator).to(layer.dtype))
    tensors = exporter.encode(layer, QuantizedLayer(q))
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
        require(
            torch.equal(_read(config, layer, tensors, packed), want), f"{where}: a reader finds other weights"
        )
    return list(tensors)


_ORDER_KEYS = {"auto-round": "packing_format", "gptq": "checkpoint_format", "awq": "version"}


def _read(
    config: Mapping[str, Any], layer: Layer, tensors: Mapping[str, Tensor], packed: Collection[str]
) -> Tensor:
    """Weight of a layer as someone finds it who has the folder only."""
    method = config["quant_method"]
    read = next(iter(READERS[method].values()))
    fields = read(config, layer.name, packed)
    require(fields is not None, f"readers of the config leave {layer.name} alone")
    found = fields or {}
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if method == "compressed-tensors":
        return compressed_reader.read_weight(parts, found, layer.shape)
    order, zero_offset = PACKINGS[config[_ORDER_KEYS[method]]]
    return read_weight(parts, StoredAs(order, zero_offset, found["bits"], found["group_size"]), layer.shape)
