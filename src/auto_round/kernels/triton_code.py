"""Triton programs on weights in the order of `kernels/fields.py`: one token, several tokens, and unpacking.

Codes become float32 without a conversion: a field that begins at bit `s` of a word, or-ed with the exponent
of `2**(23 - s)`, is the number `2**(23 - s) + code`, and one subtraction makes it `code - middle`. Both are
exact. On NVIDIA GPUs this takes one logical and one float instruction a weight, and a shift for every `23
// bits` weights; converting would need a unit of a quarter of that rate.

Everything here is imported only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXPONENT = (127 + 23) << 23
"""Bits of the float32 number 2**23."""


@triton.jit  # type: ignore[untyped-decorator]
def _number(words: tl.tensor, exponent: tl.tensor, J: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Field `J` of each word as `code - 2**(BITS - 1)`, float32.

    `exponent` is `EXPONENT`, given at run time: a logical instruction has room for one constant only, and
    of two known ones the compiler would make two instructions.
    """
    PER: tl.constexpr = 23 // BITS
    AT: tl.constexpr = (J % PER) * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << AT
    OFFSET: tl.constexpr = (1 << (23 - AT)) + (1 << (BITS - 1))
    field = ((words >> ((J // PER) * PER * BITS)) & MASK) | (exponent - (AT << 23))
    return field.to(tl.float32, bitcast=True) - OFFSET


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    words: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n_out: tl.tensor,
    n_words: tl.tensor,
    pitch: tl.tensor,
    step_row: tl.tensor,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Words `[row, column]`, which of them exist, where their steps lie, and their first inputs."""
    live = (row < n_out)[:, None] & (column < n_words)[None, :]
    word = tl.load(words + row.to(tl.int64)[:, None] * pitch + column[None, :], mask=live, other=0)
    group = column // SPAN
    step_at = row.to(tl.int64)[:, None] * step_row + group[None, :]
    return word, live, step_at, group * WIDTH + column % SPAN


@triton.jit  # type: ignore[untyped-decorator]
def _scale(
    step: tl.tensor,
    zero: tl.tensor,
    step_at: tl.tensor,
    live: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Steps, and how far zero points are from the middle (without zero points the steps again), float32."""
    scale = tl.load(step + step_at, mask=live, other=0.0).to(tl.float32)
    shift = scale
    if HAS_ZERO:
        shift = tl.load(zero + step_at, mask=live, other=0).to(tl.float32) - (1 << (BITS - 1))
    return scale, shift


@triton.jit  # type: ignore[untyped-decorator]
def _live(
    columns: tl.tensor,
    k: tl.tensor,
    n_in: tl.tensor,
    n_words: tl.tensor,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tensor:
    """Which fields hold a code; where all of a row's do, the plain comparison lets loads be vectors."""
    live = columns < n_words
    if not FULL:
        live = live & (k < tl.minimum((columns // SPAN + 1) * WIDTH, n_in))
    return live


@triton.jit  # type: ignore[untyped-decorator]
def one_token(
    x: tl.tensor,
    words: tl.tensor,
    step: tl.tensor,
    zero: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    n_words: tl.tensor,
    pitch: tl.tensor,
    step_row: tl.tensor,
    exponent: tl.tensor,
    stride_x: tl.tensor,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PASSES: tl.constexpr,
) -> None:
    """`y[token, row] = sum of x[token, k] * w[row, k]` for `ROWS` rows of one token, sums in float32.

    Each program reads whole rows; activations are read once for all of its rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    here = row < n_out
    x_row = x + token * stride_x
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in range(PASSES):
        column = i * COLUMNS + tl.arange(0, COLUMNS)
        word, live, step_at, first = _tile(words, row, column, n_out, n_words, pitch, step_row, WIDTH, SPAN)
        part = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        x_sum = tl.zeros([COLUMNS], dtype=tl.float32)
        for j in tl.static_range(32 // BITS):
            k = first + j * SPAN
            inside = _live(column, k, n_in, n_words, WIDTH, SPAN, FULL)
            x_k = tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)
            part += _number(word, exponent, j, BITS) * x_k[None, :]
            if HAS_ZERO:
                x_sum += x_k
        scale, shift = _scale(step, zero, step_at, live, BITS, HAS_ZERO)
        if HAS_ZERO:
            part -= shift * x_sum[None, :]
        total += part * scale
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)
    tl.store(y + token * n_out + row, result.to(y.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _weights(
    word: tl.tensor,
    exponent: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    J: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> tl.tensor:
    """Weights of field `J`, float32; `shift` is the zero point's distance from the middle."""
    n = _number(word, exponent, J, BITS)
    if HAS_ZERO:
        n -= shift
    return n * scale


@triton.jit  # type: ignore[untyped-decorator]
def several_tokens(
    x: tl.tensor,
    words: tl.tensor,
    step: tl.tensor,
    zero: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    n_tokens: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    n_words: tl.tensor,
    pitch: tl.tensor,
    step_row: tl.tensor,
    exponent: tl.tensor,
    stride_x: tl.tensor,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    PASSES: tl.constexpr,
) -> None:
    """`y[token, row]` of a tile of rows and tokens; weights are unpacked in registers to the dtype of `x`.

    The weight is the left factor: it comes from registers, only activations pass through shared memory. With
    `SPLIT > 1` each program of axis 2 sums a share of the words and writes `y[split, token, row]` in float32.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    here = row < n_out
    x_row = x + token.to(tl.int64)[None, :] * stride_x
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for i in range(PASSES):
        column = (i * SPLIT + tl.program_id(2)) * COLUMNS + tl.arange(0, COLUMNS)
        word, live, step_at, first = _tile(words, row, column, n_out, n_words, pitch, step_row, WIDTH, SPAN)
        scale, shift = _scale(step, zero, step_at, live, BITS, HAS_ZERO)
        for j in tl.static_range(32 // BITS):
            k = first + j * SPAN
            inside = _live(column, k, n_in, n_words, WIDTH, SPAN, FULL)
            x_k = tl.load(x_row + k[:, None], mask=inside[:, None] & (token < n_tokens)[None, :], other=0.0)
            w = _weights(word, exponent, scale, shift, j, BITS, HAS_ZERO).to(x.dtype.element_ty)
            total = tl.dot(w, x_k, total)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=here, other=0.0).to(tl.float32)[:, None]
    place = (tl.program_id(2).to(tl.int64) * n_tokens + token[None, :]) * n_out + row[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=here[:, None] & (token < n_tokens)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def unpacked(
    words: tl.tensor,
    step: tl.tensor,
    zero: tl.tensor,
    w: tl.tensor,
    n_out: tl.tensor,
    n_in: tl.tensor,
    n_words: tl.tensor,
    pitch: tl.tensor,
    step_row: tl.tensor,
    exponent: tl.tensor,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    FULL: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Weights `[n_out, n_in]`, computed in float32 and rounded once to the dtype of `w`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    word, live, step_at, first = _tile(words, row, column, n_out, n_words, pitch, step_row, WIDTH, SPAN)
    scale, shift = _scale(step, zero, step_at, live, BITS, HAS_ZERO)
    w_row = w + row.to(tl.int64)[:, None] * n_in
    for j in tl.static_range(32 // BITS):
        k = first + j * SPAN
        value = _weights(word, exponent, scale, shift, j, BITS, HAS_ZERO).to(w.dtype.element_ty)
        inside = _live(column, k, n_in, n_words, WIDTH, SPAN, FULL)
        tl.store(w_row + k[None, :], value, mask=(row < n_out)[:, None] & inside[None, :])
