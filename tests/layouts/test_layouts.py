"""Every row of the table passes the kit; mutants, damaged tensors and unfit formats do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.layouts.awq import AWQ
from auto_round.layouts.bits import pack_bits, unpack_bits
from auto_round.layouts.by_numbers import ByNumbers
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.table import (
    AWQ_GEMM,
    CHECKPOINT_LAYOUTS,
    GPTQ_PLAIN,
    GPTQ_V1,
    GPTQ_V1_INDEXED,
    GPTQ_V2_INDEXED,
    LAYOUTS,
    layout_for,
    layout_of,
)
from auto_round.numerics.presets import FORMATS, int_format
from auto_round.testing.failure import ConformanceError
from auto_round.testing.layout_kit import check_layout, random_qtensor
from auto_round.testing.slow_reader import PACKINGS, StoredAs, read_weight

SHAPES = ((32, 64), (64, 96))
ALL = {
    name: layout
    for name, layout in (LAYOUTS | CHECKPOINT_LAYOUTS).items()
    if not isinstance(layout, ByNumbers)  # floating numbers: test_compressed_float.py
}


def test_the_slow_reader_knows_every_packing_format():
    assert PACKINGS.keys() == ALL.keys()


@pytest.mark.parametrize("packing_format", ALL)
def test_every_layout_passes_the_kit_for_every_format_it_accepts(packing_format):
    layout = ALL[packing_format]
    accepted = [(f, s) for f in FORMATS.values() for s in SHAPES if layout.accepts(f, s) is None]
    assert accepted
    for fmt, shape in accepted:
        check_layout(layout, packing_format, fmt, shape)


@given(
    packing_format=st.sampled_from(list(ALL)),
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 8, 32, 40, 96, 128]),
    sym=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    shape=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 160])),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_whole_number_format_is_refused_or_survives(packing_format, bits, group, sym, dtype, shape, seed):
    layout = ALL[packing_format]
    fmt = int_format(bits, group, sym=sym, scale_dtype=dtype)
    if layout.accepts(fmt, shape) is None:
        check_layout(layout, packing_format, fmt, shape, seed=seed)
    else:
        assert isinstance(layout, AWQ)
        assert bits != 4 or shape[1] % fmt.group.width(shape[1])


def test_gptq_holds_a_short_last_group():
    check_layout(GPTQ_PLAIN, "auto_round", int_format(4, 128, sym=False), (32, 160))


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_PLAIN, AWQ_GEMM], ids=lambda layout: layout.name)
def test_quantized_weights_survive(layout):
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for sym in (True, False):
        fmt = int_format(4, 32, sym=sym)
        q = fmt.quantize(w)
        back = layout.unpack(layout.pack(q), fmt, q.shape)
        assert torch.equal(fmt.dequantize(back), fmt.dequantize(q))


def test_awq_nibbles_hold_outputs_in_the_documented_order():
    fmt = int_format(4, -1, sym=False)
    q = random_qtensor(fmt, (8, 32), 0)
    word = AWQ_GEMM.pack(q)["qweight"][0, 0].item() & 0xFFFFFFFF
    assert [word >> 4 * i & 15 for i in range(8)] == [q.codes[o, 0].item() for o in (0, 2, 4, 6, 1, 3, 5, 7)]


def test_stored_zero_points_of_symmetric_weights():
    q = random_qtensor(int_format(4, 32, sym=True), (32, 32), 0)
    assert (GPTQ_V1.pack(q)["qzeros"] == 0x77777777).all()
    assert (GPTQ_PLAIN.pack(q)["qzeros"] == 0x88888888 - 2**32).all()
    assert (AWQ_GEMM.pack(q)["qzeros"] == 0x88888888 - 2**32).all()


def test_permuting_outputs_permutes_the_stored_columns():
    fmt = int_format(3, 32, sym=True)
    q = random_qtensor(fmt, (64, 96), 1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    scale = fmt.rule.read({"step": q.scale.parts["step"][order]})
    permuted = GPTQ_V1.pack(dataclasses.replace(q, codes=q.codes[order], scale=scale))
    straight = GPTQ_V1.pack(q)
    assert torch.equal(permuted["qweight"], straight["qweight"][:, order])
    assert torch.equal(permuted["scales"], straight["scales"][:, order])


# --- mutants: consistent in both directions, so that only a reader of the bytes can tell ---


def swap_nibbles(words):
    low = words & 0x0F0F0F0F
    return (low << 4) | (((words ^ low) >> 4) & 0x0F0F0F0F)


def nibble_swapped(parts):
    return {**parts, "qweight": swap_nibbles(parts["qweight"])}


def zero_off_by_one(parts, by):
    # one more (or less) in every 4-bit field, as an implementation with the wrong offset would store
    fields = [((parts["qzeros"] >> 4 * i) + by) & 15 for i in range(8)]
    return {**parts, "qzeros": sum(f << 4 * i for i, f in enumerate(fields)).to(torch.int32)}


def group_shifted(parts, by):
    return {**parts, "scales": parts["scales"].roll(by, 0), "qzeros": parts["qzeros"].roll(by, 0)}


class Mutant:
    """A layout whose bytes are changed on the way out and changed back on the way in."""

    def __init__(self, inner, there, back):
        self.inner, self.there, self.back, self.name = inner, there, back, f"mutant of {inner.name}"

    def accepts(self, fmt, shape):
        return self.inner.accepts(fmt, shape)

    def spec(self, fmt, shape):
        return self.inner.spec(fmt, shape)

    def pack(self, q):
        return self.there(self.inner.pack(q))

    def unpack(self, parts, fmt, shape):
        return self.inner.unpack(self.back(parts), fmt, shape)


MUTATIONS = {
    "nibble swapped": (nibble_swapped, nibble_swapped),
    "zero off by one": (lambda p: zero_off_by_one(p, 1), lambda p: zero_off_by_one(p, -1)),
    "group shifted": (lambda p: group_shifted(p, 1), lambda p: group_shifted(p, -1)),
}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(
    "packing_format", ["auto_round:auto_gptq", "auto_round", "auto_round:auto_awq", *CHECKPOINT_LAYOUTS]
)
def test_mutants_fail(packing_format, mutation, sym):
    mutant = Mutant(ALL[packing_format], *MUTATIONS[mutation])
    with pytest.raises(ConformanceError, match="another reader"):
        check_layout(mutant, packing_format, int_format(4, 32, sym=sym), (32, 96))


@pytest.mark.parametrize(
    ("layout", "packing_format"),
    [
        (GPTQ("wrong offset", minus_one=False), "auto_round:auto_gptq"),
        (GPTQ("wrong offset", minus_one=True), "auto_round"),
        (GPTQ_PLAIN, "auto_round:auto_awq"),
    ],
)
def test_a_layout_under_the_name_of_another_fails(layout, packing_format):
    with pytest.raises((ConformanceError, IndexError, RuntimeError)):
        check_layout(layout, packing_format, int_format(4, 32, sym=True), (64, 96))


class LosesTheLastCode(Mutant):
    def __init__(self):
        super().__init__(GPTQ_PLAIN, dict, dict)

    def unpack(self, parts, fmt, shape):
        q = super().unpack(parts, fmt, shape)
        q.codes[-1, -1] ^= 1
        return q


def test_a_layout_that_does_not_give_back_its_codes_fails():
    with pytest.raises(ConformanceError, match="other codes"):
        check_layout(LosesTheLastCode(), "auto_round", int_format(4, 32, sym=True), (32, 32))


# --- refusals and damage ---


@pytest.mark.parametrize(
    ("layout", "fmt", "shape", "reason"),
    [
        (GPTQ_V1, int_format(4, 0, sym=True), (32, 32), "whole tensor"),
        (GPTQ_V1, int_format(4, 32, sym=True), (32, 40), "multiples of 32"),
        (GPTQ_V1, int_format(4, 32, sym=True), (33, 32), "multiples of 32"),
        (GPTQ_V1, int_format(4, 32, sym=True), (2, 32, 32), "matrices"),
        (AWQ_GEMM, int_format(3, 32, sym=True), (32, 32), "4 bits"),
        (AWQ_GEMM, int_format(4, 32, sym=True), (36, 32), "multiple of 8"),
        (AWQ_GEMM, int_format(4, 32, sym=True), (32, 80), "full groups"),
    ],
)
def test_refusals_say_why(layout, fmt, shape, reason):
    refusal = layout.accepts(fmt, shape)
    assert refusal is not None
    assert reason in str(refusal)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_zero_is_stored_from_the_other_end_in_version_1(bits):
    fmt = int_format(bits, 32, sym=False)
    q = random_qtensor(fmt, (32, 64), 0, positive=True)
    q.scale.parts["zero"].clamp_(min=1)[3, 1] = 0
    q = dataclasses.replace(q, scale=fmt.rule.read(q.scale.parts))
    parts = GPTQ_V1.pack(q)
    turned = torch.zeros(2, 32, dtype=torch.bool)
    turned[1, 3] = True
    assert torch.equal(parts["scales"] < 0, turned)
    assert torch.equal(parts["scales"].abs(), q.scale.parts["step"].t())
    top = (1 << bits) - 1
    assert unpack_bits(parts["qzeros"], bits).max() < top
    codes = unpack_bits(parts["qweight"].t(), bits)
    assert torch.equal(codes[3, 32:], top - q.codes[3, 32:])
    seen = read_weight(parts, StoredAs("gptq", 1, bits, 32), (32, 64))
    assert torch.equal(seen, fmt.dequantize(q))
    back = GPTQ_V1.unpack(parts, fmt, (32, 64))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scale.parts["zero"], q.scale.parts["zero"])


def test_a_group_of_zeros_and_one_without_negative_weights_survive_version_1():
    fmt = int_format(2, 32, sym=False)
    w = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    w[:, 32:] = 0
    q = fmt.quantize(w)
    assert not q.scale.parts["zero"].any()
    assert torch.equal(read_weight(GPTQ_V1.pack(q), StoredAs("gptq", 1, 2, 32), w.shape), fmt.dequantize(q))


def test_a_wrapped_zero_point_of_someone_else_is_read_as_0():
    fmt = int_format(4, 32, sym=False)
    q = random_qtensor(fmt, (32, 64), 0, positive=True)
    wrapped = GPTQ_PLAIN.pack(q)
    wrapped = {**wrapped, "qzeros": pack_bits(unpack_bits(wrapped["qzeros"], 4) - 1 & 15, 4)}
    back = GPTQ_V1.unpack(wrapped, fmt, (32, 64))
    assert torch.equal(back.scale.parts["zero"], q.scale.parts["zero"])


def test_a_negative_asymmetric_step_of_someone_else_means_the_same_weights():
    fmt = int_format(3, 32, sym=False)
    q = random_qtensor(fmt, (32, 64), 0)
    q.scale.parts["zero"].clamp_(min=1)
    q = dataclasses.replace(q, scale=fmt.rule.read(q.scale.parts))
    back = GPTQ_V1.unpack(GPTQ_V1.pack(q), fmt, (32, 64))
    assert (back.scale.step > 0).all()
    assert torch.equal(fmt.dequantize(back), fmt.dequantize(q))


def stored(layout=GPTQ_V1, sym=True):
    fmt = int_format(4, 32, sym=sym)
    q = random_qtensor(fmt, (32, 64), 0)
    return dict(layout.pack(q)), fmt, (32, 64)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("qweight", lambda t: t[:-1]),
        ("qzeros", lambda t: t.to(torch.int64)),
        ("scales", lambda t: t.to(torch.bfloat16)),
        ("scales", lambda t: t.t()),
    ],
)
def test_tensors_of_another_shape_or_dtype_are_refused_by_name(suffix, change):
    parts, fmt, shape = stored()
    parts[suffix] = change(parts[suffix])
    with pytest.raises(CheckpointError, match=suffix):
        GPTQ_V1.unpack(parts, fmt, shape)
    del parts[suffix]
    with pytest.raises(CheckpointError, match=f"{suffix} is missing"):
        GPTQ_V1.unpack(parts, fmt, shape)


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_PLAIN, AWQ_GEMM], ids=lambda layout: layout.name)
def test_zero_points_that_contradict_a_symmetric_format_are_refused(layout):
    parts, fmt, shape = stored(layout)
    parts["qzeros"][1, 1] ^= 1 << 8
    with pytest.raises(CheckpointError, match="symmetric"):
        layout.unpack(parts, fmt, shape)


@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_V1_INDEXED], ids=lambda layout: layout.name)
def test_group_index_must_be_in_order(layout):
    parts, fmt, shape = stored(layout)
    parts["g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    layout.unpack(parts, fmt, shape)
    parts["g_idx"] = parts["g_idx"].flip(0)
    with pytest.raises(UnsupportedError, match="desc_act"):
        layout.unpack(parts, fmt, shape)


@pytest.mark.parametrize(("group", "index"), [(32, [0] * 32 + [1] * 32), (-1, [0] * 64)])
def test_the_group_of_each_input_is_stored(group, index):
    fmt = int_format(4, group, sym=True)
    parts = GPTQ_V2_INDEXED.pack(random_qtensor(fmt, (32, 64), 0))
    assert parts["g_idx"].tolist() == index
    assert parts["g_idx"].dtype == torch.int32
    del parts["g_idx"]
    with pytest.raises(CheckpointError, match="g_idx is missing"):
        GPTQ_V2_INDEXED.unpack(parts, fmt, (32, 64))


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, AWQ_GEMM),
        ({"quant_method": "auto-round"}, GPTQ_V1),
        ({"quant_method": "gptq"}, GPTQ_V1_INDEXED),
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, GPTQ_V1_INDEXED),
        ({"quant_method": "gptq", "checkpoint_format": "GPTQ_V2"}, GPTQ_V2_INDEXED),
        ({"quant_method": "awq"}, AWQ_GEMM),
        ({"quant_method": "awq", "version": "GEMM"}, AWQ_GEMM),
    ],
)
def test_the_layout_that_a_config_names(config, layout):
    assert layout_of(config) is layout


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "checkpoint_format": "gemm"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "awq", "version": "gptq"},
    ],
)
def test_orders_of_bytes_that_are_not_known(config):
    with pytest.raises(ConfigError, match=list(config.values())[1]):
        layout_of(config)


def test_unknown_packing_formats_get_the_nearest_names():
    with pytest.raises(ConfigError, match="auto_round:auto_gptq"):
        layout_for("auto_round:auto_gtpq")
    assert layout_for("auto") is layout_for("auto_round:gptq") is GPTQ_V1
