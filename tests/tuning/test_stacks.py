"""Large stacks of matrices are rounded one matrix after the other: the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round.errors import InternalError
from auto_round.models.matrix_experts import using
from auto_round.numerics import compiled_rounding
from auto_round.numerics.compiled_rounding import can_round
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import nv_format
from auto_round.numerics.search import QUICK
from auto_round.tuning import weights
from auto_round.tuning.config import Optimizer, TuneConfig
from auto_round.tuning.objective import Objective
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.stacks import LearnedStack
from auto_round.tuning.weights import Weight, WeightTask
from auto_round.tuning.workspace import Workspace
from models.test_matrix_experts import experts_of, stand_in

FORMATS = {
    "int2": int_format(2, 32, sym=True),
    "asym": int_format(4, -1, sym=False),
    "a number for each matrix": nv_format(),
}


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("effort", [None, QUICK], ids=["plain", "searched"])
def test_one_after_the_other_is_all_at_once(monkeypatch, name, effort):
    found = []
    for at_once in (10**9, 1):
        monkeypatch.setattr(weights, "AT_ONCE", at_once)
        weight = Weight.of(Stack(), "experts", WeightTask(FORMATS[name]), effort)
        trained = [weight.v.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(1)), *knobs(weight)]
        for each in trained:
            each.requires_grad_(True)
        made = weight.fake()
        made.backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(2)))
        found.append([made.detach(), *(each.grad for each in trained)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    q = weight.quantize()
    assert torch.equal(q.format.dequantize(q, weight.dtype), found[1][0])


def knobs(weight):
    return weight.knobs.lo, weight.knobs.hi


class Block(nn.Module):
    """Fused experts of Transformers behind a router that is a plain table."""

    def __init__(self, dtype=torch.float32, calls=1):
        super().__init__()
        self.experts, self.calls = stand_in(experts_of("qwen3_moe", dtype)), calls

    def forward(self, hidden):
        for _ in range(self.calls):
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, chosen = flat[:, :3].softmax(-1).topk(2)  # the last expert is never chosen
            hidden = hidden + self.experts(flat, chosen, weights).reshape(hidden.shape)
        return hidden


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.05},
        {"optimizer": Optimizer.ADAM, "keep_best": False},
        {"momentum": 0.5, "rows_at_once": 3, "keep_best": False},
        {"tune_range": False, "keeps_offsets": True, "keep_best": False},
        {"tune_rounding": False, "lr": 0.05},
        {"lr": 0.05, "accumulate": 2},
    ],
    ids=["signs", "adam", "parts", "offsets", "ranges", "batches"],
)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=["int2", "asym", "nvfp4"])
@pytest.mark.parametrize("calls", [1, 2], ids=["once", "twice"])
def test_tuned_matrix_by_matrix_is_tuned_whole(settings, fmt, calls):
    block = Block(calls=calls)
    x = torch.randn(12, 6, 64, generator=torch.Generator().manual_seed(3))
    data = Samples((x,), (block(x).detach(),))
    tasks = {f"experts.{name}": WeightTask(fmt) for name in ("gate_up_proj", "down_proj")}
    config = TuneConfig(iters=6, batch_size=4, **settings)
    found = [
        tune_block(
            block,
            tasks,
            data,
            data,
            config,
            generator=torch.Generator().manual_seed(0),
            objective=Objective(matrix_by_matrix=by_matrix),
        )
        for by_matrix in (True, False)
    ]
    assert found[0].loss == found[1].loss
    for name, q in found[0].weights.items():
        other = found[1].weights[name]
        assert torch.equal(q.codes, other.codes)
        assert torch.equal(q.scale.step, other.scale.step)


@pytest.mark.skipif(not compiled_rounding._multiplies(), reason="no such products on this CPU")
@pytest.mark.parametrize(
    "settings", [{"lr": 0.02}, {"tune_range": False, "lr": 0.02}], ids=["both", "offsets"]
)
def test_bfloat16_experts_learned_row_by_row_are_those_learned_whole(monkeypatch, settings):
    """Sums run in another order, so that single offsets may differ: nearly all are the same."""
    block, multiplied = Block(torch.bfloat16), []
    x = torch.randn(12, 6, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    data = Samples((x,), (block(x).detach(),))
    tasks = {f"experts.{name}": WeightTask(FORMATS["int2"]) for name in ("gate_up_proj", "down_proj")}
    config = TuneConfig(iters=8, batch_size=4, search=False, **settings)
    learn = compiled_rounding.CompiledRounding.learn
    monkeypatch.setattr(
        compiled_rounding.CompiledRounding,
        "learn",
        lambda *a, **k: multiplied.append(len(a[2])) or learn(*a, **k),
    )
    found, count = [], []
    for few in (compiled_rounding.FEW_TOKENS, -1):
        monkeypatch.setattr(compiled_rounding, "FEW_TOKENS", few)
        generator = torch.Generator().manual_seed(0)
        objective = Objective(matrix_by_matrix=True)
        found.append(tune_block(block, tasks, data, data, config, generator=generator, objective=objective))
        count.append(len(multiplied))
    assert count[0] == count[1] > 40  # none the second time
    assert found[0].loss < 0.9 * found[0].initial_loss
    assert found[0].loss == pytest.approx(found[1].loss, rel=0.02)
    for name, q in found[0].weights.items():
        assert (q.codes == found[1].weights[name].codes).float().mean() > 0.98


def test_a_step_touches_only_what_tokens_reached():
    """And keeps no gradient: each matrix is learned as soon as its own is known."""
    block = Block()
    weight = Weight.of(block, "experts.down_proj", WeightTask(FORMATS["int2"]), None)
    for each in (weight.v, *knobs(weight)):
        each.requires_grad_(True)
    stack = LearnedStack(weight, torch.zeros((), requires_grad=True))
    stack.begin(0.25, alone=True)
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(3))
    with using(block, {"experts.down_proj": stack.round()}):
        block(x).square().sum().backward()
    assert (weight.v[:3].abs().amax((1, 2)) == 0.25).all()
    assert not weight.v[3].any()
    to_v, *to_knobs = stack.gradients()
    assert to_v is None
    assert all(side[:3].any() and not side[3].any() for side in to_knobs)


@pytest.mark.skipif(not can_round(FORMATS["int2"].grid, FORMATS["int2"].group), reason="no C compiler")
def test_matrices_are_rounded_and_differentiated_in_memory_that_stays():
    """One piece for all matrices of all stacks: what is made anew leaves holes in the C library's heap."""
    block, workspace = Block(), Workspace()
    stacks = {}
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        weight = Weight.of(block, name, WeightTask(FORMATS["int2"]), None)
        weight.v.requires_grad_(True)
        stacks[name] = LearnedStack(weight, torch.zeros((), requires_grad=True), workspace)
        stacks[name].begin(0.25, alone=True)
        stacks[name].round()
    places = set()
    for stack in stacks.values():
        made = stack.matrix(0, torch.float32)
        want = stack.weight.fake().detach()[0]
        assert torch.equal(made, want)
        places.add(made.data_ptr())
        stack.expect()
        room = stack.room(0, torch.float32)
        assert room is not None
        assert room.shape == want.shape
        places.add(room.data_ptr())
        stack.expect()  # of two products the first gradient has to be kept
        assert stack.room(0, torch.float32) is None
        stack.reached(0, torch.ones_like(want))
        again = stack.room(0, torch.float32)
        assert again is not None
        places.add(again.data_ptr())
    assert len(places) == 1


def test_a_matrix_learned_too_early_is_an_error():
    weight = Weight.of(Stack(), "experts", WeightTask(FORMATS["int2"]), None)
    weight.v.requires_grad_(True)
    stack = LearnedStack(weight, torch.zeros((), requires_grad=True)).round()
    stack.begin(0.25, alone=True)
    stack.expect()
    stack.reached(0, torch.ones(16, 64))
    with pytest.raises(InternalError):
        stack.reached(0, torch.ones(16, 64))
