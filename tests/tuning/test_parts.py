"""The loss, the optimizers and the sample runner, each against a few lines of plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from auto_round.numerics.grid import IntGrid
from auto_round.tuning.config import Optimizer, TuneConfig
from auto_round.tuning.objective import block_loss
from auto_round.tuning.samples import Samples, counted_elements, run_block, states_of
from auto_round.tuning.steps import SignDescent, make_stepper, step_factor
from tuning.blocks import Experts, Mlp, activations


def loss(output, target, mask):
    """Loss of a whole batch."""
    return block_loss(output, target, mask, counted_elements(target.shape, mask, target.device))


def test_the_loss_is_the_mean_over_counted_elements():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 4, generator=generator)
    square = (output - target).square()
    assert loss(output, target, None).item() == pytest.approx(square.mean().item())
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert loss(output, target, mask).item() == pytest.approx(square[mask].mean().item())
    assert loss(output, target, torch.ones_like(mask)).item() == pytest.approx(square.mean().item())
    assert loss(output, target, torch.zeros_like(mask)).item() == 0


def test_the_loss_of_half_precision_outputs_is_taken_in_float32():
    output, target = torch.full((1, 64, 64), 300.0).half(), torch.zeros(1, 64, 64).half()
    assert loss(output, target, None).item() == 90000
    assert loss(output, target, None).dtype == torch.float32
    near, far = torch.full((1, 1, 1), 0.5).bfloat16(), torch.full((1, 1, 1), 256.0).bfloat16()
    assert loss(far, near, None).item() == 255.5**2


def test_masked_positions_get_no_gradient_even_where_they_are_nan():
    output = torch.zeros(1, 2, 3, requires_grad=True)
    target = torch.tensor([[[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]]])
    loss(output, target, torch.tensor([[True, False]])).backward()
    assert output.grad.tolist() == [[pytest.approx([-2 / 3, -4 / 3, -2]), [0, 0, 0]]]


def test_sign_descent_by_hand():
    p, q, untouched = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0]), torch.tensor([7.0])
    stepper = SignDescent([([p, untouched], 0.5), ([q], 0.25)], momentum=0.0)
    stepper.step([torch.tensor([3.0, -1e-9, 0.0]), None, torch.tensor([2.0])], 1.0)
    stepper.step([torch.tensor([-1.0, -5.0, 0.0]), None, torch.tensor([2.0])], 0.5)
    assert p.tolist() == [1 - 0.5 + 0.25, 1 + 0.5 + 0.25, 1]
    assert q.tolist() == [-0.25 - 0.125]
    assert untouched.tolist() == [7]


def test_sign_descent_steps_by_gradients_that_share_memory():
    """An expanded one cannot take its own signs, and two parameters may have the same."""
    p, q, r = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    shared = torch.tensor([3.0, -0.5, 0.0])
    SignDescent([([p, q, r], 0.5)], momentum=0.0).step([torch.tensor(-2.0).expand(3), shared, shared], 1.0)
    assert torch.equal(p, torch.full((3,), 0.5))
    assert torch.equal(q, torch.tensor([-0.5, 0.5, 0.0]))
    assert torch.equal(r, q)


def test_momentum_follows_the_sign_of_the_running_sum():
    p = torch.tensor([0.0])
    stepper = SignDescent([([p], 1.0)], momentum=0.5)
    seen = []
    for gradient in (4.0, -1.0, -0.6, -0.1):  # running sums 4, 1, -0.1, -0.15
        stepper.step([torch.tensor([gradient])], 1.0)
        seen.append(p.item())
    assert seen == [-1, -2, -1, 0]


def test_adam_by_hand_skips_what_has_no_gradient():
    offsets, ranges, others = torch.zeros(2), torch.ones(2), torch.ones(1)
    config = TuneConfig(optimizer=Optimizer.ADAM, lr=0.1, range_lr=0.01)
    stepper = make_stepper(config, [offsets], [(ranges, 8.0)], [others])
    with torch.no_grad():
        stepper.step([torch.tensor([5.0, -0.3]), torch.tensor([1.0, 1.0]), None], 0.5)
    # The first step of Adam is lr * sign(g).
    assert offsets.tolist() == pytest.approx([-0.05, 0.05], rel=1e-5)
    assert ranges.tolist() == pytest.approx([0.995, 0.995], rel=1e-5)
    assert others.tolist() == [1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_step_of_the_range_moves_outer_weights_as_far_as_one_of_an_offset(bits):
    offset, knob, other = torch.zeros(1), torch.ones(1), torch.zeros(1)
    stepper = make_stepper(TuneConfig(iters=200), [offset], [(knob, IntGrid(bits, 0).end_steps)], [other])
    stepper.step([torch.ones(1), torch.ones(1), torch.ones(1)], 1.0)
    outermost = 2 ** (bits - 1)  # quantization steps from zero
    assert (knob.item() - 1) * outermost == pytest.approx(offset.item(), rel=2e-3)
    assert other.item() == pytest.approx(0.2 * offset.item())


@pytest.mark.parametrize("optimizer", list(Optimizer))
def test_a_range_step_that_is_given_holds_for_all_bits(optimizer):
    config = TuneConfig(optimizer=optimizer, range_lr=0.01)
    knobs = [torch.ones(1), torch.ones(1)]
    stepper = make_stepper(config, [], [(knobs[0], 2.0), (knobs[1], 128.0)], [])
    with torch.no_grad():
        stepper.step([torch.ones(1), torch.ones(1)], 1.0)
    assert [k.item() for k in knobs] == pytest.approx([0.99, 0.99])


def test_schedules():
    sign, adam = TuneConfig(iters=4), TuneConfig(iters=4, optimizer=Optimizer.ADAM)
    assert [step_factor(sign, s) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [step_factor(adam, s) for s in range(4)] == pytest.approx(
        [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]
    )
    own = TuneConfig(iters=4, schedule=lambda step, iters: step / iters)
    assert [step_factor(own, s) for s in range(4)] == [0, 0.25, 0.5, 0.75]


def test_default_sign_steps_can_move_an_offset_to_a_half():
    for iters in (50, 200, 1000):
        offset = torch.zeros(1)
        config = TuneConfig(iters=iters)
        stepper = make_stepper(config, [offset], [], [])
        for step in range(iters):
            stepper.step([-torch.ones(1)], step_factor(config, step))
        assert 0.5 <= offset.item() <= 0.52


def test_running_a_block_in_batches_in_place_and_in_part():
    block = Mlp()
    x = activations(7, 0)
    want = block(x)
    out = torch.zeros_like(x)
    run_block(block, Samples((x,), (x,)), (out,), batch_size=3)
    torch.testing.assert_close(out, want)
    part = torch.zeros_like(x)
    run_block(block, Samples((x,), (x,)), (part,), batch_size=2, rows=range(2, 5))
    torch.testing.assert_close(part[2:5], want[2:5])
    assert (part[:2] == 0).all()
    assert (part[5:] == 0).all()
    run_block(Experts(), Samples((x,), (x,)), (x,), batch_size=3)
    torch.testing.assert_close(x, Experts()(activations(7, 0))[0])
    assert not out.requires_grad


def test_outputs_that_hold_no_tensor_are_refused():
    x = torch.ones(2)
    assert states_of((x, None), (0,)) == (x,)
    assert states_of([x], (0,)) == (x,)
    assert states_of(x, (0,)) == (x,)
    other = torch.zeros(3)
    assert states_of((other, x, None), (1, 0)) == (x, other)
    for wrong, order in (({"hidden": x}, (0,)), ((x, None), (0, 1)), (x, (1, 0)), ((None, x), (0,))):
        with pytest.raises(TypeError, match="must return"):
            states_of(wrong, order)
