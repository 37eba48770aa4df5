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

from auto_round.kernels import triton_table
from auto_round.kernels.fields import BitFields
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


def compiled_for(program, given, capability=90, **options):
    """A program as Triton compiles it for a GPU that is not here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = {"words": "*i32", "step": "*fp16", "zero": "*u8"}
    kinds, known = {}, {}
    for place, name in enumerate(program.arg_names):
        is_pointer = name in pointers or name in "xyw bias"
        kinds[name] = pointers.get(name, "*bf16" if is_pointer else "i32")
        if name in given:
            kinds[name] = "constexpr"
        elif name != "n_tokens":  # what launches find out: addresses and sizes are multiples of 16
            known[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, kinds, constexprs=given, attrs=known)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def test_programs_compile_for_a_gpu():
    """Compiling finds what the interpreter lets pass."""
    pytest.importorskip("triton")
    from auto_round.kernels import triton_code

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
        assert "ptx" in compiled_for(program, {**constants, **others}).asm


H100, RTX_4090 = 227 << 10, 99 << 10
"""Shared memory of a program, bytes."""


def test_tiles_take_the_loads_in_flight_that_there_is_room_for():
    for tokens in (2, 17, 64):
        for bits in range(2, 9):
            wanted = next(tile for most, tile in triton_table.PREFILL if tokens <= most)
            assert triton_table.prefill_tile(tokens, 32 // bits, H100) == wanted
            fitting = triton_table.prefill_tile(tokens, 32 // bits, RTX_4090)
            assert triton_table.shared_bytes(fitting, 32 // bits) <= RTX_4090
    assert triton_table.prefill_tile(64, 16, RTX_4090).stages < triton_table.prefill_tile(64, 16, H100).stages


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared"), [(90, H100), (89, RTX_4090)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("tokens", [2, 17, 64])
def test_programs_fit_into_shared_memory(capability, shared, bits, tokens):
    """A program that asks for more than there is fails when it is launched, on that card only."""
    pytest.importorskip("triton")
    from auto_round.kernels import triton_code

    fields = BitFields(bits, 4096, 128)
    tile = triton_table.prefill_tile(tokens, fields.per_word, shared)
    given = {
        "BITS": bits,
        "WIDTH": 128,
        "SPAN": fields.span,
        "FULL": fields.full,
        "HAS_ZERO": True,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "HAS_BIAS": False,
        "PASSES": -(-fields.n_words // tile.columns),
        "TOKENS": tile.tokens,
        "SPLIT": 1,
    }
    program = compiled_for(
        triton_code.several_tokens, given, capability, num_warps=tile.warps, num_stages=tile.stages
    )
    assert program.metadata.shared <= triton_table.shared_bytes(tile, fields.per_word) <= shared
