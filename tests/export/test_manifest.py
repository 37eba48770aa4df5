"""The manifest: what is copied, what is replaced, and that nothing is lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.errors import InternalError
from auto_round.export.table import EXPORTERS
from auto_round.facts.tensor import TensorSpec
from auto_round.pipeline.writing.stacks import Stacks
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.exporter_kit import small_case

S = QuantizationScheme


def manifest_of(case, name="auto_round", tensors=None):
    exporter = EXPORTERS[name].for_plan(case.plan, case.layers)
    return exporter.manifest(case.plan, case.layers, tensors or case.tensors)


def test_every_source_tensor_is_copied_or_replaced():
    case = small_case(S(4, 32))
    manifest = manifest_of(case)
    replaced = {layer.tensor for layer in case.layers if layer.name in manifest.encoded}
    assert set(manifest.copied) == set(case.tensors) - replaced
    assert set(manifest.specs) == {
        *manifest.copied,
        *(n for names in manifest.encoded.values() for n in names),
    }
    assert all(manifest.specs[name] == case.tensors[name] for name in manifest.copied)
    assert "model.layers.0.mlp.up_proj.weight" not in manifest.specs
    assert manifest.encoded["model.layers.0.mlp.up_proj"] == tuple(
        f"model.layers.0.mlp.up_proj.{s}" for s in ("qweight", "qzeros", "scales")
    )


def test_a_tied_head_is_added_and_the_embedding_stays():
    case = small_case(S(4, 32), head=S(4, 32), tied=True)
    for name in ("auto_round", "fake"):
        manifest = manifest_of(case, name)
        assert "model.embed_tokens.weight" in manifest.copied
        assert all(tensor.startswith("lm_head.") for tensor in manifest.encoded["lm_head"])
        assert list(manifest.specs)[-1].startswith("lm_head.")


def test_a_fake_output_is_as_large_as_the_source():
    case = small_case(S(4, 32))
    manifest = manifest_of(case, "fake")
    assert manifest.specs == case.tensors
    assert manifest.nbytes == sum(torch.empty(s.shape, dtype=s.dtype).nbytes for s in case.tensors.values())


def test_bytes_of_a_layer():
    manifest = manifest_of(small_case(S(4, 32)))
    # [96, 64]: codes 96 * 64 / 2, zero points 2 groups of 96 / 2, scales 2 groups of 96 in two bytes
    assert manifest.layer_bytes()["model.layers.0.mlp.up_proj"] == 96 * 32 + 2 * 48 + 2 * 96 * 2


def test_the_order_does_not_depend_on_the_order_of_layers():
    case = small_case(S(4, 32))
    turned = dataclasses.replace(case, layers=case.layers[::-1])
    assert list(manifest_of(case).specs) == list(manifest_of(turned).specs)


def test_names_that_collide_are_found():
    case = small_case(S(4, 32))
    taken = case.tensors | {"model.layers.0.mlp.up_proj.scales": TensorSpec(torch.float32, (1,))}
    with pytest.raises(InternalError, match="scales"):
        manifest_of(case, tensors=taken)


def test_matrices_of_one_tensor_are_one_there_again():
    plain = small_case(S(4, 32))
    name, stack = "model.layers.0.mlp.experts.{}.up_proj", "model.layers.0.mlp.experts.gate_up"
    like = plain.layers[0]
    experts = [
        dataclasses.replace(
            like, name=name.format(i), tensor=stack, shape=(32, 64), expert=i, rows=(0, 32), fused=True
        )
        for i in range(3)
    ]
    entries = {**plain.plan.entries, **{e.name: plain.plan.entries[like.name] for e in experts}}
    layers = [*plain.layers, *experts]
    tensors = {**plain.tensors, stack: TensorSpec(like.dtype, (3, 32, 64))}
    plan = dataclasses.replace(plain.plan, entries=entries)
    manifest = EXPORTERS["fake"].manifest(plan, layers, tensors)
    assert manifest.specs[stack] == tensors[stack]
    assert manifest.specs.keys() == tensors.keys()
    assert {manifest.encoded[e.name] for e in experts} == {(stack,)}
    assert manifest.stacked == {f"{e.name}.weight": e for e in experts}

    held = Stacks(manifest)
    rows = {f"{e.name}.weight": torch.full((32, 64), float(e.expert), dtype=like.dtype) for e in experts}
    last = rows.popitem()
    assert held.complete(rows) == {}
    whole = held.complete(dict([last]))[stack]
    assert [int(whole[i].unique()) for i in range(3)] == [0, 1, 2]
    other = {"model.norm.weight": torch.ones(4)}
    assert held.complete(other) == other
