"""A new kernel is one file and one row: it is chosen where it fits, tried before it is trusted, and refused
with a reason elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.kernels.check import trial
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import describe_kernels, select_kernel
from auto_round.kernels.table import KERNELS
from auto_round.numerics.activation import TokenInt
from auto_round.numerics.presets import int_format
from auto_round.testing import kernel_kit
from kernels.made_up import NAME, ROW, SumsKernel

TABLE = {**KERNELS, NAME: ROW}
FITTING = [s for s in kernel_kit.specs() if ROW.kernel.refuses(s) is None]


def spec_of(fmt=None, dtype=torch.float32, activation=None):
    return LinearSpec(fmt or int_format(4, 32, sym=True), (64, 256), dtype, "cpu", activation)


@pytest.mark.parametrize("dtype", kernel_kit.DTYPES, ids=str)
@pytest.mark.parametrize("spec", FITTING, ids=lambda s: s.fmt.name)
def test_it_passes_the_kit(spec, dtype):
    for check in kernel_kit.CHECKS:
        check(ROW.kernel, replace(spec, dtype=dtype))


def test_its_row_is_all_that_a_choice_needs():
    assert [s.fmt.group.size for s in FITTING] == [32, 128]  # not those of 96 in rows of 160
    assert select_kernel(spec_of(), kernels=TABLE).name == NAME
    assert select_kernel(spec_of(), "Made_Up:Sums", TABLE).name == NAME
    assert select_kernel(spec_of(), "torch", TABLE).name == "torch"
    assert "priority 9; can run here; also made_up:sums" in describe_kernels(TABLE)[NAME]
    with pytest.raises(ConfigError, match=f'unknown backend "{NAME}"'):
        select_kernel(spec_of(), NAME)  # the package's own table is as it was


def test_the_chosen_kernel_multiplies():
    spec = spec_of()
    kernel, q = select_kernel(spec, kernels=TABLE), kernel_kit.exact_case(spec)
    x = torch.arange(5 * 256).reshape(5, 256).remainder(7).float() - 3
    want = torch.nn.functional.linear(x, spec.fmt.dequantize(q), torch.ones(64))
    assert torch.equal(kernel.linear(x, kernel.prepare(q, spec), spec, torch.ones(64)), want)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (spec_of(int_format(4, 32, sym=False)), "holds symmetric whole numbers of 4 bits"),
        (spec_of(int_format(3, 32, sym=True)), "holds symmetric whole numbers of 4 bits"),
        (spec_of(int_format(4, 48, sym=True)), "needs groups of one size that fill 256 inputs"),
        (spec_of(int_format(4, 0, sym=True)), "needs groups of one size"),
        (spec_of(activation=TokenInt(8, sym=True)), "does not round inputs, which this layer wants"),
    ],
    ids=["zero points", "3 bits", "short group", "one group", "activations"],
)
def test_where_it_does_not_fit_it_is_passed_over(spec, reason):
    assert select_kernel(spec, kernels=TABLE).name != NAME
    with pytest.raises(UnsupportedError, match=f"{NAME}: {reason}"):
        select_kernel(spec, NAME, TABLE)


@dataclass(frozen=True)
class Wrong(SumsKernel):
    """Takes each group's step for its neighbour's."""

    def linear(self, x, buffers, spec, bias):
        shifted = {**buffers, "step": buffers["step"].roll(1, dims=-1)}
        return super().linear(x, shifted, spec, bias)


@dataclass(frozen=True)
class Failing(SumsKernel):
    """Meets a machine that cannot run it."""

    def linear(self, x, buffers, spec, bias):
        raise RuntimeError("no such instruction")


def test_the_kit_finds_a_wrong_one():
    assert kernel_kit.fails(Wrong(), spec_of())


@pytest.mark.parametrize(
    ("kernel", "reason"), [(Wrong(), "gives wrong results"), (Failing(), "no such instruction")], ids=str
)
def test_it_is_tried_before_it_is_trusted(kernel, reason):
    spec, table = spec_of(), {**KERNELS, NAME: replace(ROW, kernel=kernel)}
    assert reason in str(trial(kernel, spec))
    assert select_kernel(spec, kernels=table).name == "torch"
    with pytest.raises(UnsupportedError, match=reason):
        select_kernel(spec, NAME, table)
