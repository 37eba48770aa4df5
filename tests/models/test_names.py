"""Where rows of disk tensors end up, found by converting row numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import CheckpointError
from auto_round.facts.tensor import TensorSpec
from auto_round.models.fused import MatrixPlace
from auto_round.models.names import DiskTensor, Recipe, map_names
from auto_round.models.places import Locator
from auto_round.models.skeleton import build_skeleton
from auto_round.testing.tiny_models import tiny_config


class Stacking:
    """A converter that stacks each pattern's tensors and joins the patterns along the rows."""

    def __init__(self, order=None, transposed=False):
        self.order, self.transposed, self.held = order, transposed, {}

    def add_tensor(self, key, name, pattern, tensor):
        self.held.setdefault(pattern, []).append(tensor)

    def convert(self, key, model, config):
        made = torch.cat([torch.stack(tensors) for tensors in self.held.values()], dim=1)
        if self.order is not None:
            made = made[:, self.order]
        return {key: made.transpose(1, 2) if self.transposed else made}


class Modelless:
    config = None


def located(experts, heights, **how):
    pieces = tuple(DiskTensor(f"{e}.{p}", str(p)) for p in range(len(heights)) for e in range(experts))
    disk = {
        f"{e}.{p}": TensorSpec(torch.bfloat16, (h, 7)) for p, h in enumerate(heights) for e in range(experts)
    }
    return Locator(Modelless(), disk).locate(Recipe("w", ("w",), pieces, Stacking(**how)))


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 5), heights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_stacked_rows_are_found(experts, heights):
    places = located(experts, heights)
    starts = [0, *itertools.accumulate(heights)]
    for name, place in places.items():
        expert, part = map(int, name.split("."))
        rows = None if len(heights) == 1 else (starts[part], starts[part + 1])
        assert place == MatrixPlace(expert, rows)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), heights=st.lists(st.integers(2, 4), min_size=1, max_size=3))
def test_only_whole_matrices_are_addressed(data, heights):
    """Matrices may stand in any order inside a parameter, but their rows must stay together and in order."""
    ends = list(itertools.accumulate(heights))
    parts = [list(range(end - height, end)) for end, height in zip(ends, heights, strict=True)]
    whole = [[*itertools.chain(*order)] for order in itertools.permutations(parts)]
    order = data.draw(st.one_of(st.sampled_from(whole), st.permutations(range(ends[-1]))))
    assert isinstance(located(2, heights, order=list(order)), str) == (list(order) not in whole)


def test_transposing_is_noticed():
    assert isinstance(located(3, [4, 4], transposed=True), str)


def test_a_whole_pattern_missing_is_an_error():
    model = build_skeleton(tiny_config("mixtral"), torch.float32)
    base = "model.layers.0.block_sparse_moe.experts"
    disk = {f"{base}.{e}.w1.weight": TensorSpec(torch.float32, (48, 32)) for e in range(4)}
    with pytest.raises(CheckpointError, match=r"w1.*and 3 more"):
        map_names(model, disk)


def test_two_tensors_for_one_weight_are_an_error():
    model = build_skeleton(tiny_config("llama"), torch.float32)
    spec = TensorSpec(torch.float32, (32,))
    with pytest.raises(CheckpointError, match="both"):
        map_names(model, {"model.norm.weight": spec, "norm.weight": spec})


@pytest.mark.parametrize("spelling", ["model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"])
def test_with_and_without_the_base_prefix(spelling):
    model = build_skeleton(tiny_config("llama"), torch.float32)
    names = map_names(model, {spelling: TensorSpec(torch.float32, (48, 32))})
    assert list(names.by_target) == ["model.layers.0.mlp.up_proj.weight"]
    assert names.recipes[0].pieces[0].name == spelling
