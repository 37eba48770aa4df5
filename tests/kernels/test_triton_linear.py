"""The `triton` kernel: its programs in Triton's interpreter, its words, its refusals."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.triton_linear import TritonKernel
from auto_round.numerics.presets import int_format
from auto_round.testing import kernel_kit

KERNEL = TritonKernel()
SHAPES = {32: (19, 96), 128: (16, 200), -1: (21, 60), 0: (8, 64), 48: (18, 112)}
"""Group size -> shape: odd numbers of outputs, short last groups, rows that do not fill words."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_programs_in_the_interpreter(marks):
    """A few programs of every width in the default run, all of them in the slow one."""
    programs = str(Path(__file__).with_name("triton_programs.py"))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, programs],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    assert " passed" in found.stdout
    assert "failed" not in found.stdout


def _specs():
    for bits in range(2, 9):
        for size, shape in SHAPES.items():
            yield LinearSpec(int_format(bits, size, sym=bits % 2 == 0), shape, torch.float16, "cpu")


@pytest.mark.parametrize("spec", [*_specs(), *kernel_kit.specs()], ids=repr)
def test_restore(spec):
    kernel_kit.check_restore(KERNEL, spec)


def test_refusals():
    spec = LinearSpec(int_format(4, 32, sym=True), (16, 64), torch.float16, "cuda")
    if not torch.cuda.is_available():
        assert "no cuda device" in str(KERNEL.refuses(spec)) or "not installed" in str(KERNEL.refuses(spec))
    assert "not on cpu" in str(KERNEL.refuses(replace(spec, device="cpu")))
    assert "float32" in str(KERNEL.refuses(replace(spec, dtype=torch.float32)))


def test_words_hold_what_was_promised():
    """Three bits take 10 codes a word, rows begin at multiples of 64 bytes."""
    spec = LinearSpec(int_format(3, 30, sym=True), (2, 60), torch.float16, "cpu")
    words = KERNEL.prepare(kernel_kit.exact_case(spec), spec)["words"]
    assert words.shape == (2, 16)
    assert words[:, :6].ne(0).any()
    assert words[:, 6:].eq(0).all()


def test_programs_compile_for_a_gpu():
    """Triton compiles for a GPU that is not here, which finds what its interpreter lets pass."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from auto_round.kernels import triton_code

    pointers = {"words": "*i32", "step": "*fp16", "zero": "*u8"}
    constants = {
        "BITS": 4,
        "WIDTH": 32,
        "SPAN": 4,
        "FULL": False,
        "HAS_ZERO": True,
        "ROWS": 16,
        "COLUMNS": 32,
    }
    more = {
        triton_code.one_token: {"HAS_BIAS": True, "PASSES": 2},
        triton_code.several_tokens: {"HAS_BIAS": True, "PASSES": 2, "TOKENS": 16, "SPLIT": 2},
        triton_code.unpacked: {},
    }
    for program, others in more.items():
        given = {**constants, **others}
        kinds = {
            name: "constexpr"
            if name in given
            else pointers.get(name, "*bf16" if name in "xyw bias" else "i32")
            for name in program.arg_names
        }
        source = ASTSource(program, kinds, constexprs=given)
        assert "ptx" in compile(source, target=GPUTarget("cuda", 90, 32)).asm
