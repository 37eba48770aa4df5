"""Packing codes into words: against whole-number arithmetic, and inverse on random input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import InternalError
from auto_round.layouts import bits as streams
from auto_round.layouts import compiled_bits
from auto_round.layouts.bits import BAND, WIDTHS, pack_bits, pack_columns, unpack_bits, words


def random_codes(bits, shape, seed):
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def stream_words(codes, bits):
    """Words of the dense stream, by Python's whole numbers."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_dense_stream_with_the_first_code_lowest(bits):
    codes = random_codes(bits, (3, 96), seed=bits)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert [[w & 0xFFFFFFFF for w in row] for row in packed.tolist()] == [
        stream_words(row, bits) for row in codes.tolist()
    ]


def test_three_bit_split_is_that_of_gptq():
    # word 0: codes 0-9 and two bits of 10; word 1: its top bit, 11-20, one bit of 21; word 2: the rest
    codes = random_codes(3, (32,), seed=5)
    v = codes.tolist()
    expected = [
        sum(v[i] << 3 * i for i in range(10)) | (v[10] & 3) << 30,
        v[10] >> 2 | sum(v[i] << 3 * (i - 11) + 1 for i in range(11, 21)) | (v[21] & 1) << 31,
        v[21] >> 1 | sum(v[i] << 3 * (i - 22) + 2 for i in range(22, 32)),
    ]
    assert [w & 0xFFFFFFFF for w in pack_bits(codes, 3).tolist()] == expected


@given(
    bits=st.sampled_from(WIDTHS),
    blocks=st.integers(1, 5),
    others=st.tuples(st.integers(0, 5), st.integers(1, 4)),
    axis=st.integers(-3, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_unpack_is_the_inverse_along_every_axis(bits, blocks, others, axis, seed):
    shape = list(others)
    shape.insert(axis % 3, 32 * blocks)
    codes = random_codes(bits, tuple(shape), seed)
    packed = pack_bits(codes, bits, axis)
    assert packed.shape[axis] == blocks * bits
    assert packed.is_contiguous()
    back = unpack_bits(packed, bits, axis)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_bands_join_without_a_seam(bits):
    codes = random_codes(bits, (2 * BAND // 4096 + 3, 4096), seed=1)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed[:3], pack_bits(codes[:3], bits))
    assert torch.equal(packed[-3:], pack_bits(codes[-3:], bits))
    assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_at_odd_offsets_and_strides_pack_alike(bits):
    buffer = random_codes(bits, (5 * 64 + 3,), seed=2)
    odd = buffer[3:].view(5, 64)
    assert torch.equal(pack_bits(odd, bits), pack_bits(odd.clone(), bits))
    every_second = random_codes(bits, (5, 128), seed=3)[:, ::2]
    assert torch.equal(pack_bits(every_second, bits), pack_bits(every_second.contiguous(), bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_argument_is_not_changed(bits):
    codes = random_codes(bits, (4, 64), seed=4)
    packed = pack_bits(codes, bits)
    copies = codes.clone(), packed.clone()
    unpack_bits(packed, bits)
    packed += 1
    assert torch.equal(codes, copies[0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_with_the_sign_bit_set(bits):
    codes = torch.full((1, 32), (1 << bits) - 1, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.eq(-1).all()
    assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize(("n_codes", "bits"), [(31, 3), (4, 4), (8, 2), (0, 9), (32, 1)])
def test_codes_that_do_not_fill_words_are_refused(n_codes, bits):
    with pytest.raises(InternalError):
        words(n_codes, bits)
    with pytest.raises(InternalError):
        pack_bits(torch.zeros(1, n_codes, dtype=torch.uint8), bits)


def test_words_that_hold_no_whole_codes_are_refused():
    with pytest.raises(InternalError):
        unpack_bits(torch.zeros(1, 4, dtype=torch.int32), 3)


@pytest.mark.skipif(compiled_bits._program() is None, reason="no C compiler")
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (37, 416), (16, 2048)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_program_packs_and_unpacks_as_pytorch_does(bits, shape, monkeypatch):
    codes = random_codes(bits, shape, seed=bits)
    packed, columns = pack_bits(codes, bits), pack_columns(codes, bits)
    side_by_side = unpack_bits(columns.t(), bits)
    program, calls = streams.packs, []
    monkeypatch.setattr(streams, "packs", lambda *given: bool(calls.append(program(*given))))
    monkeypatch.setattr(streams, "unpacks", lambda *_: False)
    assert torch.equal(pack_bits(codes, bits), packed)
    assert torch.equal(pack_columns(codes, bits), columns)
    monkeypatch.setattr(streams, "packs", lambda *_: False)
    assert torch.equal(pack_bits(codes, bits), packed)
    assert torch.equal(pack_columns(codes, bits), columns)
    assert columns.is_contiguous()
    assert torch.equal(columns, packed.t())
    assert torch.equal(side_by_side, codes)
    assert torch.equal(unpack_bits(columns.t(), bits), codes)
    assert calls == [bits == 4, bits == 4]  # the program knows one width


@pytest.mark.parametrize(
    ("bits", "n"), [(2, 16), (2, 48), (4, 8), (4, 40), (6, 16), (6, 80), (8, 4), (8, 44)]
)
def test_rows_that_end_within_thirty_two_codes(bits, n):
    codes = random_codes(bits, (19, n), seed=n)
    for packed in (pack_bits(codes, bits), pack_columns(codes, bits).t()):
        assert [[w & 0xFFFFFFFF for w in row] for row in packed.tolist()] == [
            stream_words(row, bits) for row in codes.tolist()
        ]
        assert torch.equal(unpack_bits(packed, bits), codes)
