"""GGUF blocks: two other readers find the same weights, bit for bit; mutants and misfits do not pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import CheckpointError
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.layouts.gguf_fields import (
    Half,
    NibblePairs,
    Octet,
    Planes,
    SignedCodes,
    SixBitPairs,
    SixBitSigned,
)
from auto_round.numerics.presets import FORMATS, GGUF_FORMATS, int_format
from auto_round.testing.layout_kit import check_round_trip
from auto_round.testing.slow_block_reader import READERS, read_blocks

BITS = {
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q5_0": 5.5,
    "q5_1": 6.0,
    "q8_0": 8.5,
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "mxfp4": 4.25,
    "nvfp4": 4.5,
}
NUMBER = 0.37
"""What the blocks of NVFP4 are multiplied by; other types are whole without such a number."""
every_type = pytest.mark.parametrize("name", GGUF_BLOCKS)


def same_bits(a, b):
    """Whether two float32 tensors are the same bits, any NaN for any other, and any zero for any other."""
    a, b = a + 0.0, b + 0.0
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def near(a, b):
    """Whether they are alike but for the last bits, any NaN for any other."""
    return bool(torch.isclose(a, b, rtol=2e-7, atol=0, equal_nan=True).all())


def agree(name, parts, read, ours):
    """Two readers find the same weights, bit for bit where no number beside the blocks is multiplied last."""
    assert near(times(parts, read), ours) if name == "nvfp4" else same_bits(read, ours)


def random_octets(name, rows, blocks, seed, finite=True):
    """Blocks of random bytes; where `finite`, fields of scales are no infinities and no NaN."""
    layout = GGUF_BLOCKS[name]
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (rows, blocks, layout.block_bytes), generator=generator).to(torch.uint8)
    at = 0
    for field in layout.fields:
        if finite and isinstance(field, Half):
            octets[..., at + 1] = torch.where(octets[..., at + 1] & 0x7C == 0x7C, 0x31, octets[..., at + 1])
        if finite and isinstance(field, Octet):
            most = 254 if name == "mxfp4" else 126
            octets[..., at : at + field.size] = octets[..., at : at + field.size].clamp_max(most)
        at += field.size
    return octets.reshape(rows, -1)


def stored(name, octets):
    return {"weight": octets} | ({"scale": torch.tensor([NUMBER])} if name == "nvfp4" else {})


def times(parts, values):
    """What a reader of blocks alone gives, times the number beside them."""
    return values * parts["scale"] if "scale" in parts else values


def unpacked(name, octets):
    layout = GGUF_BLOCKS[name]
    shape = (len(octets), octets.shape[1] // layout.block_bytes * layout.weights)
    return layout.unpack(stored(name, octets), layout.format, shape)


def test_every_type_is_there():
    assert set(GGUF_BLOCKS) == set(GGUF_FORMATS) == set(READERS) == set(BITS)
    for name, layout in GGUF_BLOCKS.items():
        assert (layout.weights, layout.block_bytes) == READERS[name][:2]
        assert layout.block_bytes * 8 / layout.weights == BITS[name]
        beside = 32 / (4 * 512) if name == "nvfp4" else 0
        assert layout.format.bits_per_weight((4, 512)) == BITS[name] + beside


@every_type
def test_quantized_weights_survive(name):
    layout = GGUF_BLOCKS[name]
    w = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    q = layout.format.quantize(w)
    parts = check_round_trip(layout, q)
    agree(name, parts, read_blocks(name, parts["weight"]), layout.format.dequantize(q))


@given(name=st.sampled_from(list(GGUF_BLOCKS)), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_bytes_are_a_weight_and_come_back(name, seed):
    octets = random_octets(name, 2, 2, seed)
    q = unpacked(name, octets)
    assert torch.equal(GGUF_BLOCKS[name].pack(q)["weight"], octets)
    agree(name, stored(name, octets), read_blocks(name, octets), q.format.dequantize(q))
    check_round_trip(GGUF_BLOCKS[name], q)


def extreme_weights():
    """Zeros, largest and smallest numbers, one side only, and one weight among zeros."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 512, generator=generator)
    w[0] = 0
    w[1, :256] = 0
    w[2], w[3] = w[2].abs(), -w[3].abs()
    w[4] *= 1e-30
    w[5] *= 1e-6
    w[6] *= 1e30
    w[7] = torch.where(torch.arange(512) % 97 == 5, w[7], torch.zeros(()))
    w[8] = 65504.0
    w[9] = -65504.0
    w[10] = 2.0**-24
    w[11, ::2] *= 1e-4
    return w


@every_type
def test_the_package_of_llama_cpp_reads_the_same_bits(name):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name.upper()]
    layout = GGUF_BLOCKS[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.weights, layout.block_bytes)

    def theirs(octets):
        return torch.from_numpy(gguf.dequantize(octets.numpy(), kind))

    for seed in range(3):
        octets = random_octets(name, 8, 4, seed)
        q = unpacked(name, octets)
        agree(name, stored(name, octets), theirs(octets), q.format.dequantize(q))
    w = extreme_weights()
    q = layout.format.quantize(w)
    parts = layout.pack(q)
    agree(name, parts, theirs(parts["weight"]), layout.format.dequantize(q))
    assert torch.isfinite(layout.format.dequantize(q)).all()


@every_type
def test_what_does_not_fit_is_refused(name):
    layout = GGUF_BLOCKS[name]
    fmt = layout.format
    assert layout.accepts(fmt, (4, 2 * layout.weights)) is None
    assert "whole blocks" in str(layout.accepts(fmt, (4, layout.weights + 16)))
    assert "matrices" in str(layout.accepts(fmt, (2, 4, layout.weights)))
    others = [f for f in GGUF_FORMATS.values() if f != fmt]
    assert all(layout.accepts(f, (4, 256)) is not None for f in others)
    octets = random_octets(name, 4, 1, 0)
    with pytest.raises(CheckpointError, match="expected"):
        layout.unpack(stored(name, octets[:, 1:]), fmt, (4, layout.weights))
    with pytest.raises(CheckpointError, match="missing"):
        layout.unpack({}, fmt, (4, layout.weights))


def test_whole_number_formats_of_the_same_numbers_fit():
    assert GGUF_BLOCKS["q4_0"].accepts(int_format(4, 32, sym=True), (4, 64)) is None
    assert GGUF_BLOCKS["q8_0"].accepts(FORMATS["int8_g32_sym"], (4, 64)) is None
    assert GGUF_BLOCKS["q4_0"].accepts(int_format(4, 64, sym=True), (4, 64)) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class ExchangedPairs(NibblePairs):
    def pack(self, contents):
        return NibblePairs.pack(self, {"sc": contents["mn"], "mn": contents["sc"]})

    def unpack(self, octets):
        found = NibblePairs.unpack(self, octets)
        return {"sc": found["mn"], "mn": found["sc"]}


@dataclasses.dataclass(frozen=True, slots=True)
class UnshiftedScales(SixBitSigned):
    """Six bits in two's complement."""

    def pack(self, contents):
        return SixBitSigned.pack(self, {"sc": (contents["sc"] & 63) - 32})

    def unpack(self, octets):
        return {"sc": ((SixBitSigned.unpack(self, octets)["sc"] + 32) ^ 32) - 32}


@dataclasses.dataclass(frozen=True, slots=True)
class LateScalesFirst(SixBitPairs):
    def pack(self, contents):
        return SixBitPairs.pack(self, {name: contents[name].roll(4, -1) for name in ("sc", "mn")})

    def unpack(self, octets):
        return {name: x.roll(-4, -1) for name, x in SixBitPairs.unpack(self, octets).items()}


@dataclasses.dataclass(frozen=True, slots=True)
class OffsetCodes(SignedCodes):
    def pack(self, contents):
        return contents["codes"].clone()

    def unpack(self, octets):
        return {"codes": octets.clone()}


MUTANTS = {
    "q4_0, neighbours share a byte": ("q4_0", {1: Planes(32, 0, 4, 1)}),
    "q8_0, offset instead of signed": ("q8_0", {1: OffsetCodes(32)}),
    "q5_0, fifth bits by columns": ("q5_0", {1: Planes(32, 4, 1, 4)}),
    "q2_k, scales and minima exchanged": ("q2_k", {0: ExchangedPairs(16)}),
    "q2_k, d and dmin exchanged": ("q2_k", {2: Half("dmin"), 3: Half("d")}),
    "q3_k, scales without offset": ("q3_k", {2: UnshiftedScales()}),
    "q3_k, short runs": ("q3_k", {1: Planes(256, 0, 2, 16)}),
    "q4_k, runs of 64": ("q4_k", {3: Planes(256, 0, 4, 64)}),
    "q4_k, late scales first": ("q4_k", {2: LateScalesFirst()}),
    "q6_k, runs of 32": ("q6_k", {0: Planes(256, 0, 4, 32)}),
    "nvfp4, runs of 16": ("nvfp4", {1: Planes(64, 0, 4, 16)}),
    "nvfp4, neighbours share a byte": ("nvfp4", {1: Planes(64, 0, 4, 1)}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_read_their_own_bytes_but_others_do_not(mutant):
    name, changes = MUTANTS[mutant]
    layout = GGUF_BLOCKS[name]
    fields = tuple(changes.get(i, field) for i, field in enumerate(layout.fields))
    wrong = dataclasses.replace(layout, fields=fields)
    q = layout.format.quantize(torch.randn(2, 256, generator=torch.Generator().manual_seed(3)))
    parts = check_round_trip(wrong, q)
    assert not near(times(parts, read_blocks(name, parts["weight"])), q.format.dequantize(q))


@every_type
def test_bands_of_rows_are_joined(name, monkeypatch):
    q = unpacked(name, random_octets(name, 5, 2, 7))
    whole = GGUF_BLOCKS[name].pack(q)["weight"]
    monkeypatch.setattr("auto_round.layouts.gguf.BAND", 1)
    check_round_trip(GGUF_BLOCKS[name], q)
    assert torch.equal(GGUF_BLOCKS[name].pack(q)["weight"], whole)
