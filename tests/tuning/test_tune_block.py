"""Tuning beats rounding to nearest, changes nothing but what it returns, and follows its settings."""

from __future__ import annotations

import copy

import pytest
import torch

from auto_round.errors import ConfigError, NumericsError
from auto_round.numerics.importance import Importance
from auto_round.numerics.presets import int_format
from auto_round.numerics.scale import Knobs
from auto_round.numerics.search import QUICK, THOROUGH
from auto_round.tuning.config import Optimizer, TuneConfig
from auto_round.tuning.objective import Objective, block_objective
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from auto_round.tuning.steps import batch_rows, held_out_looks
from auto_round.tuning.weights import MARGIN, Weight, WeightTask, round_to_nearest
from tuning.blocks import HIDDEN, W2, Experts, Mlp, activations, generator, samples, tasks

QUICKLY = TuneConfig(iters=40)
PLAIN = TuneConfig(iters=40, search=False)


def tune(block, config=QUICKLY, fmt=W2, seed=0, data=None, held_out=None, **named):
    data = samples(block) if data is None else data
    held_out = samples(block, 16, seed=2) if held_out is None else held_out
    return tune_block(block, tasks(block, fmt), data, held_out, config, generator=generator(seed), **named)


def loss_of(block, weights, data, others=None):
    """Mean squared error of the block with dequantized weights, computed without the tuning code."""
    changed = copy.deepcopy(block)
    with torch.no_grad():
        for name, q in weights.items():
            changed.get_parameter(name).copy_(q.format.dequantize(q))
        for name, value in (others or {}).items():
            changed.get_parameter(name).copy_(value)
        out = changed(data.inputs[0])
        out = out[0] if isinstance(out, tuple) else out
        return (out.float() - data.targets[0].float()).square().mean().item()


def rounded(block, fmt=W2, effort=None):
    return {n: round_to_nearest(block.get_parameter(n), fmt, None, effort) for n in tasks(block)}


def same_codes(a, b):
    return all(torch.equal(a[n].codes, b[n].codes) for n in a)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, -1), (4, 32), (4, 0)])
def test_tuning_beats_rounding_to_nearest_on_data_it_has_not_seen(bits, group, sym):
    block, fmt = Mlp(), int_format(bits, group, sym=sym)
    held_out, unseen = samples(block, 16, seed=2), samples(block, 16, seed=3)
    tuned = tune(block, PLAIN, fmt, held_out=held_out)
    plain = rounded(block, fmt)
    assert tuned.initial_loss == pytest.approx(loss_of(block, plain, held_out), rel=1e-4)
    assert tuned.loss == pytest.approx(loss_of(block, tuned.weights, held_out), rel=1e-4)
    assert tuned.loss < 0.9 * tuned.initial_loss
    assert loss_of(block, tuned.weights, unseen) < 0.9 * loss_of(block, plain, unseen)
    assert tuned.best_step > 0


@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(iters=40, momentum=0.9, lr=0.005),
        TuneConfig(iters=40, optimizer=Optimizer.ADAM),
        TuneConfig(iters=40, batch_size=4, accumulate=2),
        TuneConfig(iters=40, tune_range=False),
        TuneConfig(iters=40, tune_rounding=False),
        TuneConfig(iters=40, tune_norm_bias=True),
        TuneConfig(iters=40, keep_best=False),
        TuneConfig(iters=40, schedule=lambda step, iters: 1.0 if step < iters // 2 else 0.2),
        TuneConfig(iters=9, lr=0.05, batch_size=100),
    ],
    ids=["momentum", "adam", "accumulate", "offsets", "ranges", "norms", "last", "schedule", "short"],
)
def test_every_setting_improves_on_its_start(config):
    block = Mlp()
    tuned = tune(block, config)
    held_out = samples(block, 16, seed=2)
    assert tuned.loss < tuned.initial_loss < loss_of(block, rounded(block), held_out)
    assert tuned.loss == pytest.approx(loss_of(block, tuned.weights, held_out, tuned.others), rel=1e-4)


def test_norms_and_biases_are_learned_and_kept_in_their_dtype():
    block = Mlp(torch.bfloat16)
    with_norms = tune(block, TuneConfig(iters=40, tune_norm_bias=True, lr=0.02))
    assert set(with_norms.others) == {"norm.weight", "norm.bias", "up.bias"}
    for name, value in with_norms.others.items():
        assert value.dtype == torch.bfloat16
        assert not torch.equal(value, block.get_parameter(name))
    assert not tune(block).others


def test_no_iterations_round_in_the_searched_range_without_data():
    block = Mlp()
    nothing = Samples((torch.empty(0),), (torch.empty(0),))

    def rtn(**settings):
        config = TuneConfig(iters=0, **settings)
        return tune_block(block, tasks(block), nothing, nothing, config, generator=generator()).weights

    assert same_codes(rtn(search=False), rounded(block))
    assert same_codes(rtn(), rounded(block, effort=THOROUGH))
    held_out = samples(block, 16, seed=2)
    assert loss_of(block, rtn(), held_out) < loss_of(block, rtn(search=False), held_out)


def test_a_start_with_importance_and_a_weight_held_more_exactly():
    block = Mlp(torch.bfloat16)
    exact = {
        n: p.float() + 1e-3 * torch.randn(p.shape, generator=generator(5))
        for n, p in block.named_parameters()
    }
    importance = {
        "up.weight": Importance(torch.linspace(0.1, 4, HIDDEN)),
        "down.weight": Importance(torch.linspace(4, 0.1, 64)),
    }
    tasked = {n: WeightTask(W2, exact[n], importance[n]) for n in tasks(block)}
    data = samples(block)
    got = tune_block(block, tasked, data, data, TuneConfig(iters=0), generator=generator())
    want = {n: round_to_nearest(exact[n], W2, importance[n], THOROUGH) for n in tasked}
    assert same_codes(got.weights, want)
    assert not same_codes(got.weights, rounded(block, effort=THOROUGH))


def test_same_seed_same_bytes_another_seed_another_order():
    block = Mlp()
    first, again, other = tune(block), tune(block), tune(block, seed=1)
    for name, q in first.weights.items():
        assert torch.equal(q.codes, again.weights[name].codes)
        assert torch.equal(q.scale.step, again.weights[name].scale.step)
    assert first.loss == again.loss
    assert not same_codes(first.weights, other.weights)


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_the_block_is_not_modified(optimizer):
    block = Mlp()
    before = copy.deepcopy(block)
    attributes = {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in block.named_modules()}
    parameters = {n: (id(p), p.data_ptr(), p._version) for n, p in block.named_parameters()}
    data = samples(block)
    inputs, targets = data.inputs[0].clone(), data.targets[0].clone()
    tune(block, TuneConfig(iters=10, tune_norm_bias=True, optimizer=optimizer), data=data)
    assert {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in block.named_modules()} == attributes
    assert {n: (id(p), p.data_ptr(), p._version) for n, p in block.named_parameters()} == parameters
    for name, p in block.named_parameters():
        assert torch.equal(p, before.get_parameter(name))
        assert p.grad is None
        assert not p.requires_grad
    for module in block.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module.training
    assert torch.equal(data.inputs[0], inputs)
    assert torch.equal(data.targets[0], targets)


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_an_expert_without_tokens_stays_rounded_to_nearest(optimizer):
    block = Experts()
    tuned = tune(block, TuneConfig(iters=20, search=False, optimizer=optimizer))
    plain = rounded(block)
    for name, q in tuned.weights.items():
        same = torch.equal(q.codes, plain[name].codes) and torch.equal(q.scale.step, plain[name].scale.step)
        assert same == name.startswith("second."), name


def test_an_expert_with_some_tokens_is_tuned():
    block = Experts(threshold=0.2)
    tuned = tune(block, TuneConfig(iters=20, search=False))
    assert not any(torch.equal(q.codes, rounded(block)[n].codes) for n, q in tuned.weights.items())


def test_masked_positions_have_no_influence():
    block = Mlp()
    masks = torch.rand(32, 8, generator=generator(7)) < 0.6
    masks[0] = True
    clean, dirty = samples(block, masks=masks), samples(block, masks=masks)
    dirty.inputs[0][~masks] = 100.0
    dirty.targets[0][~masks] = torch.nan
    results = [tune(block, data=data, held_out=data) for data in (clean, dirty)]
    assert results[0].loss == results[1].loss
    for name, q in results[0].weights.items():
        assert torch.equal(q.codes, results[1].weights[name].codes)
        assert torch.equal(q.scale.step, results[1].weights[name].scale.step)
    assert not same_codes(results[0].weights, tune(block, held_out=samples(block)).weights)


def _rounding_is_perfect(block):
    """Held-out samples whose targets are what rounding to nearest gives: no step can improve on the start."""
    changed = copy.deepcopy(block)
    with torch.no_grad():
        for name, q in rounded(block).items():
            changed.get_parameter(name).copy_(q.format.dequantize(q))
    return samples(changed, 16, seed=2)


def _counted(log):
    def objective(*arguments):
        log.append(1)
        return block_objective(*arguments)

    return Objective(loss=objective)


@pytest.mark.parametrize(("patience", "steps"), [(0, 40), (1, 10), (10, 10), (11, 20), (20, 20), (100, 40)])
@pytest.mark.parametrize("keep_best", [True, False])
def test_patience_stops_and_the_best_or_the_last_is_kept(patience, steps, keep_best):
    block, log = Mlp(), []
    config = TuneConfig(iters=40, search=False, patience=patience, keep_best=keep_best)
    tuned = tune(block, config, held_out=_rounding_is_perfect(block), objective=_counted(log))
    assert len(log) == steps
    assert same_codes(tuned.weights, rounded(block)) == keep_best
    assert tuned.best_step == (0 if keep_best else steps)
    assert tuned.initial_loss == pytest.approx(0, abs=1e-10)
    assert (tuned.loss > 1e-4) == (not keep_best)


def _logged(data, log):
    def arguments(index):
        log.append(list(index))
        return (), {}

    return Samples(data.inputs, data.targets, arguments)


def test_accumulated_batches_are_the_samples_of_the_large_batch():
    block = Mlp()
    data, held_out = samples(block), samples(block, 4, seed=2)
    logs = {}
    for batch, accumulate in ((8, 1), (4, 2)):
        log = logs[accumulate] = []
        config = TuneConfig(iters=10, batch_size=batch, accumulate=accumulate, growing_batch=False)
        tune(block, config, data=_logged(data, log), held_out=held_out)
    halves = [sorted(a + b) for a, b in zip(logs[2][::2], logs[2][1::2], strict=True)]
    assert halves == logs[1]
    assert all(len(set(batch)) == 8 for batch in logs[1])
    for epoch in (logs[1][:4], logs[1][4:8]):
        assert sorted(i for batch in epoch for i in batch) == list(range(32))
    assert logs[1][:4] != logs[1][4:8]


def test_accumulated_gradients_are_those_of_the_large_batch():
    block = Mlp()
    one_step = {"iters": 1, "search": False, "keep_best": False, "lr": 0.4, "growing_batch": False}
    large, small = (
        tune(block, TuneConfig(batch_size=batch, accumulate=accumulate, **one_step)).weights
        for batch, accumulate in ((8, 1), (2, 4))
    )
    for name, q in large.items():
        assert (q.codes == small[name].codes).float().mean() > 0.995
        assert (q.codes == rounded(block)[name].codes).float().mean() < 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_cut_into_passes_gives_the_gradients_of_the_whole(masked):
    block = Mlp()
    masks = None
    if masked:
        masks = torch.rand(32, 8, generator=generator()) < torch.linspace(0.1, 1, 32)[:, None]
    data = samples(block, masks=masks)
    one_step = {"iters": 1, "search": False, "keep_best": False, "lr": 0.4, "growing_batch": False}
    whole, *cut = (
        tune(block, TuneConfig(batch_size=8, rows_at_once=rows, **one_step), data=data)
        for rows in (0, 1, 3, 8, 50)
    )
    for parts in cut:
        assert parts.loss == pytest.approx(whole.loss, rel=1e-3)
        for name, q in whole.weights.items():
            assert (q.codes == parts.weights[name].codes).float().mean() > 0.995
            assert (q.codes == rounded(block)[name].codes).float().mean() < 0.9


def test_batches_grow_and_stay_whole_where_asked():
    block = Mlp()
    data, held_out = samples(block), samples(block, 4, seed=2)
    sizes = {}
    for growing in (True, False):
        log = []
        config = TuneConfig(iters=10, batch_size=8, growing_batch=growing)
        tune(block, config, data=_logged(data, log), held_out=held_out)
        sizes[growing] = [len(batch) for batch in log]
    assert sizes[True] == [2, 2, 2, 2, 2, 2, 4, 4, 8, 8]
    assert sizes[False] == [8] * 10
    assert [batch_rows(TuneConfig(iters=4, batch_size=1), step) for step in range(4)] == [1] * 4


def test_the_held_out_loss_is_looked_at_late_or_throughout_with_patience():
    assert held_out_looks(TuneConfig(iters=200)) == [100, 120, 140, 160, 180, 200]
    assert held_out_looks(TuneConfig(iters=200, patience=30)) == [*range(20, 200, 20), 200]
    assert held_out_looks(TuneConfig(iters=7)) == [7]
    assert held_out_looks(TuneConfig(iters=40)) == [20, 30, 40]


def test_ranges_stay_ranges_however_large_the_steps():
    block = Mlp()
    wild = TuneConfig(iters=4, range_lr=9.0, tune_rounding=False, keep_best=False)
    for q in tune(block, wild, int_format(4, 32, sym=False)).weights.values():
        assert (q.scale.step > 0).all()
        assert torch.isfinite(q.scale.step).all()


def test_without_held_out_samples_the_others_choose():
    block = Mlp()
    data = samples(block, 4)
    empty = Samples((data.inputs[0][:0],), (data.targets[0][:0],))
    tuned = tune(block, data=data, held_out=empty)
    assert 0 < tuned.loss < tuned.initial_loss
    with pytest.raises(ConfigError, match="no samples to tune on"):
        tune(block, data=empty, held_out=data)


def test_blocks_of_bfloat16_are_tuned_with_what_they_will_run_with():
    block = Mlp(torch.bfloat16)
    held_out = samples(block, 16, seed=2)
    tuned = tune(block, PLAIN, held_out=held_out)
    assert tuned.loss == pytest.approx(loss_of(block, tuned.weights, held_out), rel=1e-2)
    assert tuned.loss < 0.8 * loss_of(block, rounded(block), held_out)


def test_bad_weights_are_named_and_counted():
    block = Mlp()
    with torch.no_grad():
        block.down.weight[1, 2:4] = torch.nan
    with pytest.raises(NumericsError, match=r"down\.weight: 2 of 2048 weights are NaN or infinite"):
        tune(block)


@pytest.mark.parametrize("where", ["samples", "held_out"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_a_loss_that_is_not_finite_stops_the_run(where, bad):
    block = Mlp()
    data, held_out = samples(block), samples(block, 16, seed=2)
    {"samples": data, "held_out": held_out}[where].targets[0][3, 2, 1] = bad
    with pytest.raises(NumericsError, match="loss became"):
        tune(block, data=data, held_out=held_out)


def test_start_of_the_search_is_never_lost():
    """With a step size of nearly nothing the result is the start."""
    block = Mlp()
    tuned = tune(block, TuneConfig(iters=5, lr=1e-12, range_lr=1e-12))
    assert same_codes(tuned.weights, rounded(block, effort=QUICK))


def test_positional_and_named_arguments_reach_the_block():
    class Scaled(Mlp):
        def forward(self, x, factor, *, shift):
            return super().forward(x) * factor + shift

    block = Scaled()
    inputs = activations(8, 1)
    factors = torch.linspace(0.5, 2, 8).reshape(8, 1, 1)

    def arguments(index):
        return (factors[list(index)],), {"shift": 3.0}

    data = Samples((inputs,), (block(inputs, factors, shift=3.0),), arguments)
    tuned = tune(block, data=data, held_out=data)
    assert 0 < tuned.loss < 0.8 * tuned.initial_loss


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iters", -1), ("batch_size", 0), ("accumulate", 0), ("patience", -1),
        ("lr", 0.0), ("lr", -1.0), ("lr", float("nan")), ("range_lr", 10.0),
        ("momentum", 1.0), ("momentum", -0.1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        TuneConfig(**{name: value})


def test_settings_that_leave_nothing_to_tune_are_refused():
    with pytest.raises(ConfigError, match="nothing is left to tune"):
        TuneConfig(tune_rounding=False, tune_range=False)
    TuneConfig(iters=0, tune_rounding=False, tune_range=False)


def test_gradients_too_small_for_float16_still_tune():
    """As those of a mean over millions of elements are: here because what the block adds is small."""

    class Small(Mlp):
        def forward(self, x):
            hidden = torch.nn.functional.linear(x * 1e-3, self.up.weight)
            return self.down(torch.relu(hidden))

    def found(dtype):
        block = Small(dtype)
        return tune(block, PLAIN, data=samples(block), held_out=samples(block, 16, seed=2))

    exact, half = found(torch.float32), found(torch.float16)
    assert exact.loss < 0.8 * exact.initial_loss
    assert half.loss == pytest.approx(exact.loss, rel=0.1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        TuneConfig(iters=12, batch_size=4, accumulate=2),
        TuneConfig(iters=12, rows_at_once=1, tune_range=False),
        TuneConfig(iters=12, tune_rounding=False, tune_norm_bias=True),
    ],
    ids=["all", "offsets", "ranges and norms"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_again_gives_the_same_bits(config, masked, dtype):
    """Memory is saved and time is lost, and nothing else; an expert without tokens has no gradient."""
    block = Experts().to(dtype) if masked else Mlp().to(dtype)
    whole = tune(block, config)
    again = tune(block, config, objective=Objective(rounds_again=True))
    assert same_codes(whole.weights, again.weights)
    assert whole.loss == again.loss
    assert whole.best_step == again.best_step
    for name, value in whole.others.items():
        assert torch.equal(value, again.others[name])


@pytest.mark.parametrize("fmt", [W2, int_format(3, 16, sym=False)], ids=lambda fmt: fmt.name)
def test_held_codes_have_the_gradient_of_their_ranges(fmt):
    block = Mlp()
    weight = Weight.of(block, "up.weight", WeightTask(fmt), QUICK)
    weight.v.uniform_(-0.4, 0.4, generator=torch.Generator().manual_seed(1))
    knobs = [weight.knobs.lo, weight.knobs.hi]
    for knob in knobs:
        knob.requires_grad_()
    found = weight.fake(hold=True)
    assert torch.equal(found, weight.fake())
    ahead = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((found * ahead).sum(), knobs)
    q = weight.quantize()
    alone = weight.format.fake_rescale(q, weight.stats, weight.knobs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((alone * ahead).sum(), knobs), strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-6)


def test_kept_offsets_round_to_the_same_codes_from_a_little_further_inside():
    block = Mlp()
    weight = Weight.of(block, "up.weight", WeightTask(W2), None)
    generator = torch.Generator().manual_seed(4)
    near = torch.rand(weight.v.shape, generator=generator) * 0.02 - 0.01
    step = weight.format.rule_for(weight.stats).fit(weight.stats, W2.grid, None).step
    u = weight.original / step.repeat_interleave(16, 1)
    weight.v.copy_(u.floor() + 0.5 + near - u)  # at the border between two numbers
    codes = weight.quantize().codes
    learned = weight.learned()
    assert torch.equal(weight.format.quantize(weight.original, learned.knobs, learned.v).codes, codes)
    for way in (0.5 * MARGIN, -0.5 * MARGIN):
        moved = weight.format.quantize(weight.original, learned.knobs, learned.v + way).codes
        assert (moved != codes).float().mean() < 0.01
    crossed = weight.format.quantize(weight.original, learned.knobs, weight.v + 0.5 * MARGIN).codes
    assert (crossed != codes).float().mean() > 0.1


def test_kept_offsets_of_a_stack_are_those_of_its_matrices():
    generator = torch.Generator().manual_seed(5)
    stack = torch.randn(3, 8, 32, generator=generator)
    offsets = torch.rand(stack.shape, generator=generator) - 0.5

    def kept(w, v):
        stats = W2.stats(w)
        ones = Knobs(torch.ones_like(stats.lo), torch.ones_like(stats.hi))
        return Weight(W2.bind(stats), w, stats, ones, v, torch.float32).learned().v

    whole = kept(stack, offsets)
    assert not torch.equal(whole, offsets)
    assert torch.equal(whole, torch.stack([kept(w, v) for w, v in zip(stack, offsets, strict=True)]))
