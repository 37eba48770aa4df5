"""Every kernel of the table passes the kit; every kind of wrong kernel fails it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.kernels import cpu_avx512
from auto_round.kernels import select as select_module
from auto_round.kernels.check import trial
from auto_round.kernels.cpu_int4 import CpuIntKernel
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.reference import TorchKernel
from auto_round.kernels.select import describe_kernels, select_kernel
from auto_round.kernels.table import ABSENT, KERNELS, STAND_INS
from auto_round.numerics.activation import TokenInt
from auto_round.numerics.presets import int_format
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale import Scale
from auto_round.testing import kernel_kit

SPECS = list(kernel_kit.specs())
KERNEL_SPECS = [
    pytest.param(e.kernel, s, id=f"{n}-{s.fmt.name}")
    for n, e in KERNELS.items()
    for s in SPECS
    if e.kernel.refuses(s) is None
]
FOUR_ASYM = LinearSpec(int_format(4, 32, sym=False), (64, 256), torch.bfloat16, "cpu")


@pytest.mark.parametrize(("kernel", "spec"), KERNEL_SPECS)
def test_kit(kernel, spec):
    for dtype in kernel_kit.DTYPES if spec.fmt.grid.bits in (3, 4) else (torch.bfloat16,):
        exact = replace(spec, dtype=dtype)
        if spec.fmt.grid.bits <= 4 or kernel.name != "torch":  # wider sums of bfloat16 matrices are not exact
            kernel_kit.check_exact(kernel, exact)
        kernel_kit.check_bound(kernel, exact)
    kernel_kit.check_restore(kernel, spec)


def test_reference_is_linear_of_the_dequantized_weight():
    for spec in SPECS:
        for dtype in kernel_kit.DTYPES:
            q = kernel_kit.random_case(spec)
            x = torch.randn(5, spec.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
            bias = torch.arange(spec.shape[0]).to(dtype)
            kernel = TorchKernel()
            want = torch.nn.functional.linear(x, spec.fmt.dequantize(q, dtype), bias)
            assert torch.equal(kernel.linear(x, kernel.prepare(q, spec), spec, bias), want)


@pytest.mark.parametrize("activation", [TokenInt(8, sym=True), TokenInt(4, sym=False)], ids=lambda a: a.name)
def test_inputs_are_rounded_by_a_kernel_that_says_so(activation):
    spec = LinearSpec(int_format(4, 32, sym=True), (32, 64), torch.float32, "cpu", activation)
    kernel, q = select_kernel(spec), kernel_kit.random_case(spec)
    assert kernel.name == "torch"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    want = torch.nn.functional.linear(activation.fake_quantize(x), spec.fmt.dequantize(q))
    assert torch.equal(kernel.linear(x, kernel.prepare(q, spec), spec, None), want)
    assert trial(kernel, spec) is None
    with pytest.raises(UnsupportedError, match=f"does not round inputs.*{activation.name}"):
        select_kernel(spec, "cpu_int4")


def test_reference_in_bands(monkeypatch):
    monkeypatch.setattr("auto_round.kernels.reference.BAND", 1 << 10)
    kernel = TorchKernel()
    for spec in SPECS:
        q = kernel_kit.random_case(spec)
        assert torch.equal(
            kernel.weight(kernel.prepare(q, spec), spec, torch.float32), spec.fmt.dequantize(q)
        )


def test_int4_bands_and_odd_outputs(monkeypatch):
    monkeypatch.setattr("auto_round.kernels.cpu_int4.PACK_BAND", 1 << 14)
    monkeypatch.setattr("auto_round.kernels.cpu_int4.DENSE_BAND", 1 << 14)
    for fmt in (int_format(4, 64, sym=True), int_format(4, 64, sym=False), int_format(3, 0, sym=False)):
        spec = LinearSpec(fmt, (203, 128), torch.bfloat16, "cpu")
        for check in kernel_kit.CHECKS:
            check(CpuIntKernel(), spec)


@dataclass(frozen=True)
class Mutant:
    """A kernel that misreads its weight."""

    inner: CpuIntKernel | TorchKernel
    change: str
    name: str = "mutant"

    def compute_dtype(self, spec):
        return self.inner.compute_dtype(spec)

    def prepare(self, q, spec):
        return self.inner.prepare(_changed(q, self.change), spec)

    def restore(self, buffers, spec):
        return self.inner.restore(buffers, spec)

    def linear(self, x, buffers, spec, bias):
        return self.inner.linear(x, buffers, spec, bias)


def _changed(q: QTensor, change: str) -> QTensor:
    step, zero, codes = q.scale.step, q.scale.zero, q.codes
    if change == "swap neighbours":
        codes = codes.view(*codes.shape[:-1], -1, 2).flip(-1).flatten(-2)
    if change == "zero off by one":
        zero = zero + 1
    if change == "group shifted":
        step = step.roll(1, dims=-1)
    if change == "step doubled":
        step = step * 2
    if change == "rows swapped":
        codes = codes.roll(1, dims=0)
    return QTensor(codes, Scale(step, zero, {"step": step.half(), "zero": zero.to(torch.uint8)}), q.format)


@dataclass(frozen=True)
class SkewedExactly(CpuIntKernel):
    """Right in `restore`, wrong in the product alone."""

    def linear(self, x, buffers, spec, bias):
        y = super().linear(x, buffers, spec, bias)
        return y.roll(1, dims=-1) if x.shape[0] > 32 else y


@pytest.mark.parametrize("inner", [CpuIntKernel(), TorchKernel()], ids=lambda k: k.name)
@pytest.mark.parametrize(
    "change", ["swap neighbours", "zero off by one", "group shifted", "step doubled", "rows swapped"]
)
def test_mutants_fail(inner, change):
    assert not kernel_kit.fails(inner, FOUR_ASYM)
    mutant = Mutant(inner, change)
    with pytest.raises(AssertionError):
        kernel_kit.check_exact(mutant, FOUR_ASYM)
    with pytest.raises(AssertionError):
        kernel_kit.check_bound(mutant, FOUR_ASYM)
    assert kernel_kit.fails(mutant, FOUR_ASYM)
    assert kernel_kit.fails(SkewedExactly(), FOUR_ASYM)


def spec_of(bits=4, group_size=128, dtype=torch.bfloat16, device="cpu", shape=(64, 256)):
    return LinearSpec(int_format(bits, group_size, sym=True), shape, dtype, device)


@pytest.fixture
def without_program(monkeypatch):
    """A machine without the compiler or the instructions of `cpu_avx512`."""
    monkeypatch.setattr(cpu_avx512, "_program", lambda: Refusal("cpu_avx512.c", "no C compiler is here"))


def test_selection(without_program):
    assert select_kernel(spec_of()).name == "cpu_int4"
    assert select_kernel(spec_of(dtype=torch.float16)).name == "cpu_int4"
    assert select_kernel(spec_of(dtype=torch.float32)).name == "torch"
    assert select_kernel(spec_of(dtype=torch.float32), "int4pack").name == "cpu_int4"
    assert select_kernel(spec_of(bits=8)).name == "cpu_int8"
    assert select_kernel(spec_of(bits=8, dtype=torch.float32)).name == "torch"
    assert select_kernel(spec_of(group_size=48)).name == "torch"
    assert select_kernel(spec_of(device="cuda")).name == "torch"
    assert select_kernel(spec_of(), "Auto_Round:Torch").name == "torch"


def test_every_name_is_taken_once():
    names = [n for name, e in KERNELS.items() for n in (name, *e.aliases)]
    assert len(names) == len(set(names))
    others = [*STAND_INS, *ABSENT]
    assert len(others) == len(set(others))
    assert not set(names) & set(others)
    assert {instead for _, instead in ABSENT.values()} <= set(KERNELS)
    assert {name for s in STAND_INS.values() for name in s.names} <= set(KERNELS)
    assert all(name == e.kernel.name for name, e in KERNELS.items())


def test_refusals_name_each_kernel(without_program):
    with pytest.raises(
        UnsupportedError, match=r"(?s)no kernel for int4_g48_sym.*cpu_int4: needs groups"
    ) as caught:
        select_kernel(spec_of(group_size=48), "cpu_int4")
    assert [r.who for r in caught.value.refusals] == ["cpu_int4"]
    with pytest.raises(UnsupportedError) as caught:
        select_kernel(spec_of(group_size=48, dtype=torch.int32))
    assert [r.who for r in caught.value.refusals] == [
        "marlin",
        "cpu_avx512",
        "cpu_int4",
        "cpu_int8",
        "cpu_float",
        "fp8_scaled_mm",
        "triton",
        "torch_int4",
        "torch",
    ]


def test_unknown_and_later_backends():
    with pytest.raises(ConfigError, match=r"did you mean.*torch"):
        select_kernel(spec_of(), "torhc")
    for name, (_, instead) in ABSENT.items():
        with pytest.raises(UnsupportedError, match=f'not in this version(?s:.*)backend="{instead}"'):
            select_kernel(spec_of(), name)


@pytest.mark.parametrize(
    "name",
    ["exllamav2", "gptqmodel:exllamav2", "gptq:exllamav2", "gptq:cuda", "gptq", "awq", "AWQ:gemm", "humming"],
)
def test_names_of_other_packages_are_served(without_program, caplog, name):
    select_module._tell.cache_clear()
    assert select_kernel(spec_of(), name).name == "cpu_int4"
    assert select_kernel(spec_of(dtype=torch.float32), name).name == "torch"  # no accuracy is given away
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert f'backend "{name.casefold()}" is not here' in told[0]


def test_stand_ins(without_program):
    assert select_kernel(spec_of(), "ipex").name == "cpu_int4"
    assert select_kernel(spec_of(bits=8), "ARK").name == "cpu_int8"
    assert select_kernel(spec_of(device="hpu"), "hpu").name == "torch"


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, wanted in (("marlin", "pip install gptqmodel"), ("triton", 'pip install "triton')):
        with pytest.raises(UnsupportedError, match="not installed") as caught:
            select_kernel(spec_of(device="cuda", shape=(128, 256)), name)
        assert caught.value.refusals[0].remedy.startswith(wanted)


def test_the_table_says_what_can_run_here():
    rows = describe_kernels()
    assert list(rows) == list(KERNELS)
    assert "can run here" in rows["torch"]
    assert "cannot run here" in rows["marlin"]
    assert "only when named" in rows["marlin"]


def test_trials_find_wrong_kernels_and_failing_ones():
    with torch.device("meta"):  # as models are built
        assert trial(CpuIntKernel(), FOUR_ASYM) is None
    assert "wrong results" in str(trial(Mutant(CpuIntKernel(), "zero off by one"), FOUR_ASYM))

    class OutOfResourcesError(Exception):  # as Triton has it
        pass

    @dataclass(frozen=True)
    class Failing(CpuIntKernel):
        error: type[Exception] = RuntimeError

        def linear(self, x, buffers, spec, bias):
            raise self.error("no such instruction")

    for error in (RuntimeError, OutOfResourcesError):
        assert "no such instruction" in str(trial(Failing(error=error), FOUR_ASYM))


def test_untried_kernels_are_not_trusted(without_program):
    """A kernel that is tried first and found wrong is passed over, and named in the refusal."""
    wrong = replace(KERNELS["torch"], kernel=Skewed(), priority=9, tried=True)
    kernels = {"wrong": wrong, **KERNELS}
    assert select_kernel(spec_of(), kernels=kernels).name == "cpu_int4"
    with pytest.raises(UnsupportedError, match="wrong results"):
        select_kernel(spec_of(), "wrong", kernels)


@dataclass(frozen=True)
class Skewed(TorchKernel):
    """Wrong from 100 tokens on."""

    def linear(self, x, buffers, spec, bias):
        y = super().linear(x, buffers, spec, bias)
        return y.roll(1, dims=-1) if x.shape[0] > 100 else y
