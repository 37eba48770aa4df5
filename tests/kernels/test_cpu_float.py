"""Packed FP4 and FP8 on a CPU: every number and step, both forms of the program, and where it refuses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from auto_round.compiled import library
from auto_round.errors import Refusal, UnsupportedError
from auto_round.kernels import cpu_float
from auto_round.kernels.cpu_float import CpuFloatKernel
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.numerics.activation_float import MeasuredScales
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import E2M1, E4M3
from auto_round.numerics.group import Group
from auto_round.numerics.presets import int_format
from auto_round.numerics.presets_float import FLOAT_FORMATS, fp8_format, fp8_powers, mx_format, nv_format
from auto_round.numerics.qtensor import QTensor
from auto_round.testing import kernel_kit

KERNEL = CpuFloatKernel()
needs_program = pytest.mark.skipif(
    isinstance(cpu_float._program(), Refusal), reason=str(cpu_float._program())
)
FORMATS = {
    f.name: f for f in (*FLOAT_FORMATS.values(), fp8_powers(Group(128, 128))) if f.grid in (E2M1, E4M3)
}
WITH_BYTES = {name: f for name, f in FORMATS.items() if "step" not in f.rule.stored and f.group.rows == 1}
TOKENS = (1, 2, 3, 4, 11, 12)
"""All remainders of the tokens that fit into registers, and both sides of `DENSE_TOKENS`."""


@pytest.fixture(params=["this processor's", "plain C"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program as it is compiled here, and as on a processor that is not known."""
    if request.param == "plain C":
        plain = library(cpu_float.SOURCE, ())
        assert isinstance(plain, ctypes.CDLL)
        monkeypatch.setattr(cpu_float, "_program", lambda: plain)


def spec_of(fmt: Format, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> LinearSpec:
    return LinearSpec(fmt, shape, dtype, "cpu")


@needs_program
@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_kit(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_kit, "TOKENS", TOKENS)
    monkeypatch.setattr(cpu_float, "DENSE_BAND", 1 << 12)  # several bands, the last one short
    for shape in ((200, 256), (3, 64), (131, 192)):
        spec = spec_of(fmt, shape)
        if KERNEL.refuses(spec) is not None:
            assert fmt.group.rows > 1  # blocks of 128 inputs do not tile the short rows
            continue
        kernel_kit.check_exact(KERNEL, spec)
        kernel_kit.check_restore(KERNEL, spec)
        for dtype in kernel_kit.DTYPES:
            kernel_kit.check_bound(KERNEL, replace(spec, dtype=dtype))


def part_of_steps(fmt: Format) -> str:
    """Name of the stored part with a number for each group."""
    return next(name for name in ("exponent", "block", "step") if name in fmt.rule.stored)


def every_step(fmt: Format) -> QTensor:
    """A matrix with every code under every byte of a step: a row for each byte."""
    byte = part_of_steps(fmt)
    codes = torch.arange(256, dtype=torch.uint8) & ((1 << fmt.grid.bits) - 1)
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    parts = dict(fmt.quantize(w).scale.parts)
    parts[byte] = torch.arange(256, dtype=torch.uint8)[:, None].expand(parts[byte].shape).contiguous()
    return QTensor(codes.expand(256, 256).contiguous(), fmt.rule.read(parts), fmt)


def same_bits(got: Tensor, want: Tensor) -> bool:
    nan = want.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(
        got[~nan].view(torch.int32), want[~nan].view(torch.int32)
    )


@needs_program
@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("fmt", WITH_BYTES.values(), ids=WITH_BYTES)
def test_every_code_under_every_byte_of_a_step_is_dequantized_to_the_same_bits(fmt: Format) -> None:
    q = every_step(fmt)
    spec = spec_of(fmt, (256, 256))
    assert same_bits(numbers(KERNEL.prepare(q, spec), spec), fmt.dequantize(q))


def numbers(buffers: Mapping[str, Tensor], spec: LinearSpec) -> Tensor:
    """What the program makes of a weight."""
    weight = cpu_float._Weight.of(buffers, spec)
    return weight.call("numbers", spec.shape[1], None, torch.empty(spec.shape))


@needs_program
@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("fmt", [mx_format("fp4"), nv_format(), mx_format("fp8"), fp8_format(Group(-1))])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_every_code_at_every_place_is_multiplied(fmt: Format, tokens: int) -> None:
    """A row for each code; a token has one input that is not 0, so each result is one weight."""
    spec = spec_of(fmt, (1 << fmt.grid.bits, 64))
    made = fmt.quantize(torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)))
    codes = torch.arange(spec.shape[0], dtype=torch.uint8)[:, None].expand(spec.shape).contiguous()
    q = QTensor(codes, made.scale, fmt)
    buffers, w = KERNEL.prepare(q, spec), fmt.dequantize(q)
    for x in torch.eye(64).split(tokens):
        got = KERNEL.linear(x, buffers, spec, None)
        assert torch.equal(got, x @ w.t())


def swap_nibbles(codes: Tensor) -> Tensor:
    return codes >> 4 | codes << 4


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "nibbles swapped": ("codes", swap_nibbles),
    "sign lost": ("codes", lambda c: c & 0x77),
    "halves of a block swapped": ("codes", lambda c: c.view(len(c), -1, 2, 16).flip(2).reshape(c.shape)),
    "rows shifted": ("codes", lambda c: c.roll(1, 0)),
    "groups shifted": ("step", lambda s: s.roll(1, -1)),
    "bytes of steps off by one": ("step", lambda s: s + 1),
    "bytes of steps inverted": ("step", lambda s: ~s),
}


@dataclass(frozen=True)
class Mutant(CpuFloatKernel):
    """Misreads one of its buffers."""

    change: str = ""

    def linear(self, x, buffers, spec, bias):
        name, changed = CHANGES[self.change]
        name = "part_" + part_of_steps(spec.fmt) if name == "step" else name
        return super().linear(x, {**buffers, name: changed(buffers[name]).contiguous()}, spec, bias)


@needs_program
@pytest.mark.parametrize("fmt", [mx_format("fp4"), nv_format()], ids=lambda f: f.name)
@pytest.mark.parametrize("change", CHANGES)
def test_mutants_fail(fmt: Format, change: str) -> None:
    spec = spec_of(fmt, (32, 128))
    assert not kernel_kit.fails(KERNEL, spec)
    with pytest.raises(AssertionError):
        kernel_kit.check_exact(Mutant(change=change), spec)
    with pytest.raises(AssertionError):
        kernel_kit.check_bound(Mutant(change=change), spec)


@needs_program
def test_inputs_are_rounded() -> None:
    inputs = MeasuredScales(nv_format(measured=True))
    spec = LinearSpec(nv_format(), (32, 128), torch.bfloat16, "cpu", inputs)
    assert select_kernel(spec) == KERNEL
    q = kernel_kit.random_case(spec)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    buffers, plain = KERNEL.prepare(q, spec), replace(spec, inputs=None)
    assert torch.equal(
        KERNEL.linear(x, buffers, spec, None),
        KERNEL.linear(inputs.fake_quantize(x), buffers, plain, None),
    )
    assert KERNEL.linear(x[:0], buffers, plain, None).shape == (0, 3, 32)


@pytest.mark.slow
@needs_program
@pytest.mark.parametrize("fmt", [mx_format("fp4"), nv_format(), fp8_format(Group(-1))], ids=lambda f: f.name)
def test_compiled_models_see_one_operator(fmt: Format) -> None:
    spec = spec_of(fmt, (32, 128), torch.bfloat16)
    buffers = KERNEL.prepare(kernel_kit.random_case(spec), spec)

    def run(x: Tensor) -> Tensor:
        return KERNEL.linear(x, buffers, spec, None)

    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (1, 20):
        x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        assert torch.equal(traced(x), run(x))


REFUSED = {
    "FP4": spec_of(int_format(4, 32, sym=True), (64, 128)),
    "runs on a CPU": replace(spec_of(mx_format("fp4"), (64, 128)), device="cuda"),
    "takes bfloat16": spec_of(mx_format("fp4"), (64, 128), torch.float64),
    "does not round dequantized weights": replace(spec_of(mx_format("fp4"), (64, 128)), held=torch.bfloat16),
    "not 96 and 32": spec_of(mx_format("fp4"), (64, 96)),
    "not 128 and 48": spec_of(fp8_format(Group(48)), (64, 128)),
    "FP8": spec_of(mx_format("fp6"), (64, 128)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_refuses(reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        select_kernel(REFUSED[reason], "cpu_float")


def test_without_a_compiler_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_float, "_program", lambda: Refusal("cpu_float.c", "no C compiler is here"))
    assert select_kernel(spec_of(nv_format(), (64, 128))).name == "torch"
