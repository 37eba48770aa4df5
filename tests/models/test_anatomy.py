"""Where blocks lie on disk."""

from __future__ import annotations

import pytest
import torch

from auto_round.models.anatomy import _Dissection
from auto_round.models.names import DiskTensor, NameMap, Recipe
from auto_round.models.skeleton import build_skeleton
from auto_round.testing.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("names", "place"),
    [
        (("llm.layers.1.q.weight", "llm.layers.1.k.weight", "llm.queries.1"), "llm.layers.1"),
        (("llm.layers.1.q.weight", "llm.all_queries"), "llm.layers.1"),  # of all blocks side by side
        (("towers.1.layers.1.q.weight", "towers.1.layers.1.k.weight"), "towers.1.layers.1"),
        (("layers.1.experts.1.w", "layers.1.experts.0.w", "layers.1.q.weight"), "layers.1"),
        (("all_queries",), "model.layers.1"),
        ((), "model.layers.1"),
    ],
)
def test_beginning_of_the_names_of_a_block(names, place):
    recipes = tuple(
        Recipe(target, (target,), (DiskTensor(name, name),), None)
        for i, name in enumerate(names)
        for target in [f"model.layers.1.part{i}"]
    )
    found = NameMap(recipes, {recipe.key: recipe for recipe in recipes}, ())
    model = build_skeleton(tiny_config("llama"), torch.float32)
    assert _Dissection(model, found, {}, {})._disk_prefix("model.layers.1") == place
