"""compressed-tensors order: read by a second reader and by the library itself, at every width."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import CheckpointError
from auto_round.layouts.compressed import INT_QUANTIZED, INTEGERS, PACK_QUANTIZED
from auto_round.numerics.presets import INT_BITS, int_format
from auto_round.testing.compressed_reader import read_weight
from auto_round.testing.layout_kit import random_qtensor

SHAPES = ((64, 96), (32, 64), (40, 80))


def fields(fmt, name):
    size, sym = fmt.group.size, fmt.name.endswith(("_sym", "_sym_bfloat16"))
    return {"bits": fmt.grid.bits, "group_size": size, "sym": sym, "format": name}


def check(layout, fmt, q):
    parts = layout.pack(q)
    spec = layout.spec(fmt, q.shape)
    assert list(parts) == list(spec)
    for suffix, part in parts.items():
        assert (part.dtype, tuple(part.shape)) == (spec[suffix].dtype, spec[suffix].shape)
        assert part.is_contiguous()
    back = layout.unpack(parts, fmt, q.shape)
    assert torch.equal(back.codes, q.codes)
    assert back.codes.dtype is torch.uint8
    assert all(torch.equal(back.scale.parts[name], part) for name, part in q.scale.parts.items())
    seen = read_weight(parts, fields(fmt, layout.name), q.shape)
    assert torch.equal(seen, fmt.dequantize(q))
    return parts


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_a_second_reader_finds_the_same_weights(bits, sym):
    for shape in SHAPES:
        fmt = int_format(bits, 16 if shape == (40, 80) else -1, sym=sym)
        q = random_qtensor(fmt, shape, bits)
        check(PACK_QUANTIZED, fmt, q)
        if sym:
            check(INT_QUANTIZED, fmt, q)


@given(
    name=st.sampled_from(list(INTEGERS)),
    bits=st.sampled_from(INT_BITS),
    sym=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    shape=st.tuples(st.integers(1, 40), st.sampled_from([8, 24, 40, 64])),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_whole_number_format_is_refused_or_survives(name, bits, sym, dtype, shape, seed):
    layout, fmt = INTEGERS[name], int_format(bits, 8, sym=sym, scale_dtype=dtype)
    if layout.accepts(fmt, shape) is not None:
        assert layout is INT_QUANTIZED
        assert not sym
        return
    q = random_qtensor(fmt, shape, seed)
    parts = layout.pack(q)
    back = layout.unpack(parts, fmt, shape)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(fmt.dequantize(back), fmt.dequantize(q))


@pytest.mark.parametrize("bits", INT_BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_the_library_unpacks_the_same_weights(bits, sym, group):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=sym,
        strategy="group" if group > 0 else "channel",
        group_size=group if group > 0 else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for dtype, shape in ((torch.bfloat16, (64, 96)), (torch.float32, (40, 64))):
        fmt = int_format(bits, group, sym=sym, scale_dtype=dtype)
        q = random_qtensor(fmt, shape, bits)
        for layout in (PACK_QUANTIZED, INT_QUANTIZED) if sym else (PACK_QUANTIZED,):
            parts = dict(layout.pack(q))
            library = compressors.BaseCompressor.get_value_from_registry(layout.name)
            found = library.decompress(parts, scheme)["weight"]
            assert found.dtype is dtype
            assert torch.equal(found, fmt.dequantize(q, dtype))
        numbers = (q.codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        assert torch.equal(helpers.pack_to_int32(numbers, bits), PACK_QUANTIZED.pack(q)["weight_packed"])


def rolled(parts, suffix, axis):
    return {**parts, suffix: parts[suffix].roll(1, axis)}


MUTATIONS = {
    "word order": lambda p: rolled(p, "weight_packed", 1),
    "groups shifted": lambda p: rolled(p, "weight_scale", 1),
    "zero points of other rows": lambda p: rolled(p, "weight_zero_point", 0),
    "zero point one more": lambda p: {**p, "weight_zero_point": p["weight_zero_point"] + 0x01010101},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutants_are_noticed(mutation):
    fmt = int_format(8, 32, sym=False)
    q = random_qtensor(fmt, (32, 64), 0)
    parts = MUTATIONS[mutation](dict(PACK_QUANTIZED.pack(q)))
    assert not torch.equal(read_weight(parts, fields(fmt, "pack-quantized"), q.shape), fmt.dequantize(q))


def test_words_of_three_bits_hold_codes_across_their_ends():
    fmt = int_format(3, -1, sym=True)
    q = random_qtensor(fmt, (1, 32), 0)
    q = dataclasses.replace(q, codes=torch.zeros(1, 32, dtype=torch.uint8))
    q.codes[0, 10] = 0b110  # bits 30, 31 of the first word and 0 of the second
    first, second, third = PACK_QUANTIZED.pack(q)["weight_packed"][0].tolist()
    assert (first & 0xFFFFFFFF, second, third) == (0b10 << 30, 0b1, 0)


@pytest.mark.parametrize(
    ("layout", "fmt", "shape", "reason"),
    [
        (PACK_QUANTIZED, int_format(4, 0, sym=True), (32, 32), "whole tensor"),
        (PACK_QUANTIZED, int_format(4, 32, sym=True), (32, 80), "full groups"),
        (PACK_QUANTIZED, int_format(4, 32, sym=True), (2, 32, 32), "matrices"),
        (INT_QUANTIZED, int_format(8, -1, sym=False), (32, 32), "symmetric weights"),
    ],
)
def test_refusals_say_why(layout, fmt, shape, reason):
    assert reason in str(layout.accepts(fmt, shape))


def test_damage_is_named():
    fmt = int_format(4, 32, sym=True)
    q = random_qtensor(fmt, (32, 64), 0)
    packed, plain = dict(PACK_QUANTIZED.pack(q)), dict(INT_QUANTIZED.pack(q))
    with pytest.raises(CheckpointError, match="weight_shape is"):
        PACK_QUANTIZED.unpack({**packed, "weight_shape": torch.tensor([64, 32])}, fmt, q.shape)
    with pytest.raises(CheckpointError, match="weight_scale"):
        PACK_QUANTIZED.unpack({**packed, "weight_scale": packed["weight_scale"].float()}, fmt, q.shape)
    plain["weight"][3, 5] = 8
    with pytest.raises(CheckpointError, match=r"1 numbers .* -8 \.\.\. 7"):
        INT_QUANTIZED.unpack(plain, fmt, q.shape)
