"""The compiled program for CPUs: every path of it, and what happens where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from auto_round import compiled
from auto_round.errors import Refusal, UnsupportedError
from auto_round.kernels import cpu_avx512
from auto_round.kernels.check import error_bound
from auto_round.kernels.cpu_avx512 import CpuAvx512Kernel
from auto_round.kernels.cpu_int4 import CpuIntKernel
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.kernels.table import KERNELS
from auto_round.numerics.presets import int_format
from auto_round.testing import kernel_kit

PROGRAM = cpu_avx512._program()
needs_program = pytest.mark.skipif(isinstance(PROGRAM, Refusal), reason=str(PROGRAM))

TOKENS = (0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 515)
"""All remainders of the rows that fit into registers, the matrix unit's tiles, and more than its 512."""

CASES = [
    (bits, sym, size, shape)
    for bits, sym in ((2, False), (3, True), (4, True), (4, False), (5, False), (8, True), (8, False))
    for size, shape in ((32, (203, 96)), (128, (64, 640)), (-1, (330, 1088)), (256, (16, 512)))
]
"""Outputs that end inside a block, inputs below, at and above a strip of 512."""


def spec_of(bits=4, sym=True, size=128, shape=(64, 256), dtype=torch.bfloat16):
    return LinearSpec(int_format(bits, size, sym=sym), shape, dtype, "cpu")


@needs_program
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize(("bits", "sym", "size", "shape"), CASES)
def test_every_path(monkeypatch, bits, sym, size, shape, amx):
    if amx and not cpu_avx512._has_amx():
        pytest.skip("no matrix unit")
    monkeypatch.setattr(cpu_avx512, "_has_amx", lambda: amx)
    monkeypatch.setattr(kernel_kit, "TOKENS", tuple(t for t in TOKENS if amx or t < 64))
    spec = spec_of(bits, sym, size, shape)
    kernel_kit.check_exact(CpuAvx512Kernel(), spec)
    monkeypatch.setattr(kernel_kit, "TOKENS", kernel_kit.TOKENS[1:])  # a maximum needs a value
    kernel_kit.check_bound(CpuAvx512Kernel(), spec)


@needs_program
def test_results_do_not_depend_on_threads_or_on_other_tokens():
    kernel, spec = CpuAvx512Kernel(), spec_of(4, sym=False, shape=(700, 640))
    buffers = kernel.prepare(kernel_kit.random_case(spec), spec)
    x = torch.randn(70, 640, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([kernel.linear(x[:n], buffers, spec, None) for n in (1, 4, 7, 70)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))
    one, four, seven, all_ = results[0]
    assert torch.equal(four[:1], one)
    if cpu_avx512._has_amx():
        assert all(torch.equal(all_, other[3]) for other in results[1:])
        assert torch.equal(all_[:7], seven)
    else:  # PyTorch multiplies many tokens then: another order of float32 sums, rounded once to bfloat16
        for other in (all_, *(found[3] for found in results[1:])):
            torch.testing.assert_close(other[:7], seven, rtol=2**-7, atol=2**-7 * float(seven.abs().mean()))


@needs_program
def test_the_matrix_unit_is_shared():
    """PyTorch's own matrices and the program configure it in turns."""
    kernel, spec = CpuAvx512Kernel(), spec_of(4, shape=(256, 512))
    buffers = kernel.prepare(kernel_kit.random_case(spec), spec)
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(70, 512, generator=g).bfloat16(), torch.randn(300, 512, generator=g).bfloat16()
    calls = [
        lambda: kernel.linear(x, buffers, spec, None),
        lambda: torch.nn.functional.linear(x, w),
        lambda: kernel.linear(x[:33], buffers, spec, None),
        lambda: torch.nn.functional.linear(x[:17], w[:50]),
    ]
    alone = [call() for call in calls for _ in range(2)][1::2]
    for i in (0, 1, 2, 3, 1, 0, 3, 2, 0):
        assert torch.equal(calls[i](), alone[i])


@needs_program
def test_inputs_in_any_order_of_memory():
    kernel, spec = CpuAvx512Kernel(), spec_of(4, shape=(96, 128))
    buffers = kernel.prepare(kernel_kit.random_case(spec), spec)
    x = torch.randn(128, 3, 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    turned = x.permute(2, 1, 0)
    want = kernel.linear(turned.contiguous(), buffers, spec, None)
    assert want.shape == (2, 3, 96)
    assert torch.equal(kernel.linear(turned, buffers, spec, None), want)


@pytest.mark.parametrize("kernel", [CpuAvx512Kernel(), CpuIntKernel()], ids=lambda k: k.name)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_models_see_one_operator(kernel, dynamic):
    spec = spec_of(4, sym=False, shape=(203, 128))
    if kernel.refuses(spec) is not None:
        pytest.skip("cannot run here")
    q = kernel_kit.random_case(spec)
    buffers = kernel.prepare(q, spec)

    def run(x):
        return kernel.linear(x, buffers, spec, None)

    torch._dynamo.reset()
    traced = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (1, 7, 100, 200):
        x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        with torch.inference_mode():
            got = traced(x)
            assert torch.equal(got, run(x))
        want = x.double() @ spec.fmt.dequantize(q).double().t()
        assert ((got.double() - want).abs() <= error_bound(kernel, spec, q, x, want)).all()


@needs_program
def test_operators_keep_their_promises():
    spec = spec_of(4, shape=(203, 128))
    buffers = CpuAvx512Kernel().prepare(kernel_kit.random_case(spec), spec)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    arguments = (x, buffers["packed"], buffers["scale_zero"])
    torch.library.opcheck(torch.ops.auto_round.packed_int4_linear.default, (*arguments, 203))
    torch.library.opcheck(torch.ops.auto_round.packed_int4_dense.default, (x[0], *arguments[1:]))


@needs_program
def test_selection():
    for bits in range(2, 9):
        assert select_kernel(spec_of(bits)).name == "cpu_avx512"
    assert select_kernel(spec_of(dtype=torch.float16)).name == "cpu_avx512"
    assert select_kernel(spec_of(dtype=torch.float32)).name == "torch"
    assert select_kernel(spec_of(size=48)).name == "torch"
    assert select_kernel(spec_of(), "cpu_int4").name == "cpu_int4"


def test_a_wrong_program_is_passed_over(monkeypatch):
    monkeypatch.setattr(cpu_avx512, "_program", lambda: PROGRAM)
    right = cpu_avx512._multiply
    monkeypatch.setattr(cpu_avx512, "_multiply", lambda x, *rest: right(x, *rest).roll(1, dims=-1))
    spec = spec_of(4, shape=(128, 288), size=96)  # of which no trial is remembered
    assert select_kernel(spec).name == "cpu_int4"
    reason = PROGRAM.reason if isinstance(PROGRAM, Refusal) else "wrong results"
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        select_kernel(spec, "cpu_avx512")


def test_refusals_say_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv("AR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refusal = compiled.library(cpu_avx512.SOURCE, ("-mno-such-thing",))
    assert isinstance(refusal, Refusal)
    if "no C compiler" not in refusal.reason:
        assert "no-such-thing" in refusal.reason
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    refusal = compiled.library(cpu_avx512.SOURCE, ("-O0",))
    assert (refusal.reason, refusal.remedy) == ("no C compiler is here", "install gcc")
    monkeypatch.setattr(cpu_avx512, "_program", lambda: refusal)
    assert KERNELS["cpu_avx512"].kernel.refuses(spec_of()).remedy == "install gcc"


@needs_program
def test_libraries_are_made_once_and_also_without_a_cache(monkeypatch, tmp_path):
    options = (*(f"-mavx512{name}" for name in cpu_avx512.INSTRUCTIONS), "-mamx-tile", "-mamx-bf16")
    build = compiled.library.__wrapped__
    monkeypatch.delenv("AR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build(cpu_avx512.SOURCE, options).auto_round_usable()
    (made,) = (tmp_path / "auto_round").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", None)  # a second compilation would fail
        assert build(cpu_avx512.SOURCE, options).auto_round_usable()
    start = made.read_bytes()[:100]
    made.unlink()  # a loaded library must not change
    made.write_bytes(start)
    assert build(cpu_avx512.SOURCE, options).auto_round_usable()
    (tmp_path / "file").touch()
    monkeypatch.delenv("AR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build(cpu_avx512.SOURCE, options).auto_round_usable()


@pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="no C compiler")
def test_a_change_of_an_included_source_is_compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("AR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "outer.c").write_text('#include "inner.c"\n')
    for number in (1, 2):
        (tmp_path / "inner.c").write_text(f"int answer(void) {{ return {number}; }}\n")
        assert compiled.library.__wrapped__(tmp_path / "outer.c", ()).answer() == number
