"""The manifest: what is copied, what is replaced, and that nothing is lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.errors import InternalError
from auto_round.export.table import EXPORTERS
from auto_round.facts.tensor import TensorSpec
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
