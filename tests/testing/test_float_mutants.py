"""Every kit finds every fault that floating formats can have: what passes is right, not merely consistent."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.reference import TorchKernel
from auto_round.layouts.compressed_float import FLOATS
from auto_round.numerics.grid_float import FLOAT_GRIDS
from auto_round.numerics.group import Group
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.presets_float import FP8_BLOCK, fp8_format, mx_format, nv_format
from auto_round.numerics.scale_two_level import SharedAffine, SharedSigned
from auto_round.testing import kernel_kit
from auto_round.testing.failure import ConformanceError
from auto_round.testing.format_kit import check_format
from auto_round.testing.grid_kit import check_grid
from auto_round.testing.layout_kit import check_float_layout
from auto_round.testing.two_level_kit import check_two_level
from testing import float_mutants as m

MXFP4, MXFP8, NVFP4 = mx_format("fp4"), mx_format("fp8"), nv_format()
ROWS = fp8_format(Group(-1), scale_dtype=torch.bfloat16)
BLOCKS = fp8_format(Group(16, 2))
SPARE = {MXFP4.name: 2.0, MXFP8.name: 2.0, NVFP4.name: 1.0625}
"""What a step may be larger than the range asks for: the next power of two, half a spacing of E4M3."""

FORMATS = {
    "exponent one more": m.with_rule(MXFP4, m.power_off_by(1)),
    "exponent one less": m.with_rule(MXFP4, m.power_off_by(-1)),
    "exponent read as one more": m.with_rule(MXFP8, m.ReadOneMore),
    "exponent of a float step one more": m.with_rule(ROWS, m.StepDoubled),
    "bias of the grid off by one": m.with_grid(MXFP8, m.Doubled),
    "ties away from zero, FP4": m.with_grid(MXFP4, m.AwayFromZero),
    "ties away from zero, FP8": m.with_grid(ROWS, m.AwayFromZero),
    "codes cut off": m.with_grid(NVFP4, m.TowardsZero),
    "scale rounded down, FP8": m.with_rule(ROWS, m.StepCutOff),
    "scale rounded down, NVFP4": m.with_rule(NVFP4, m.BlockCutOff),
    "halves of codes swapped": m.with_grid(NVFP4, m.HalvesSwapped),
    "sign lost": m.with_grid(MXFP4, m.SignLost),
    "global scale missing": m.with_rule(NVFP4, m.NoGlobal),
    "block scales transposed": m.with_rule(BLOCKS, m.StepsTransposed),
}


@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, NVFP4, ROWS, BLOCKS], ids=lambda fmt: fmt.name)
def test_the_format_kit_passes_what_is_right(fmt):
    check_format(fmt, spare=SPARE.get(fmt.name, 1.0))


@pytest.mark.parametrize("fault", FORMATS)
def test_the_format_kit_finds(fault):
    fmt = FORMATS[fault]
    with pytest.raises(ConformanceError):
        check_format(fmt, spare=SPARE.get(fmt.name, 1.0))


@pytest.mark.parametrize("kind", [m.Doubled, m.AwayFromZero, m.TowardsZero, m.SignLost, m.HalvesSwapped])
@pytest.mark.parametrize("name", FLOAT_GRIDS)
def test_the_grid_kit_finds(name, kind):
    check_grid(FLOAT_GRIDS[name], name, shifted=False)
    with pytest.raises(ConformanceError):
        check_grid(m.of(kind, FLOAT_GRIDS[name]), name, shifted=False)


Q3, Q4 = GGUF_FORMATS["q3_k"], GGUF_FORMATS["q4_k"]
SIGNED, STEPS, FLOORS = Q3.rule.steps, Q4.rule.steps, Q4.rule.floors


def like(kind, multiples):
    return kind(*(getattr(multiples, f.name) for f in dataclasses.fields(multiples)))


TWO_LEVELS = {
    "exponent off by one": dataclasses.replace(Q3, rule=m.SharedDoubled(SIGNED)),
    "scale rounded down": dataclasses.replace(Q4, rule=SharedAffine(like(m.MultiplesCutOff, STEPS), FLOORS)),
    "number of the block missing": dataclasses.replace(Q4, rule=m.SharedMissing(STEPS, FLOORS)),
    "scales of a block turned": dataclasses.replace(Q3, rule=SharedSigned(like(m.MultiplesTurned, SIGNED))),
}


@pytest.mark.parametrize("fault", TWO_LEVELS)
def test_the_kit_of_two_levels_finds(fault):
    check_two_level(Q3, 0)
    check_two_level(Q4, 0)
    with pytest.raises(ConformanceError):
        check_two_level(TWO_LEVELS[fault], 0)


SQUARE = (256, 256)
LAYOUTS = {
    "mxfp4-pack-quantized": (MXFP4, (8, 64)),
    "mxfp6-pack-quantized": (mx_format("fp6"), (5, 96)),
    "mxfp8-quantized": (MXFP8, (8, 64)),
    "nvfp4-pack-quantized": (NVFP4, (4, 64)),
    "float-quantized": (fp8_format(FP8_BLOCK), SQUARE),
}


@pytest.mark.parametrize("form", LAYOUTS)
def test_the_layout_kit_passes_what_is_right(form):
    fmt, shape = LAYOUTS[form]
    check_float_layout(FLOATS[form], form, fmt, shape)


def faulty(form, part, change, back):
    return form, m.FaultyLayout(FLOATS[form], part, change, back)


WRONG_LAYOUTS = {
    "exponent one more": faulty("mxfp4-pack-quantized", "weight_scale", lambda x: x + 1, lambda x: x - 1),
    "exponent one less": faulty("mxfp8-quantized", "weight_scale", lambda x: x - 1, lambda x: x + 1),
    "nibbles swapped, MXFP4": faulty(
        "mxfp4-pack-quantized", "weight_packed", m.nibbles_swapped, m.nibbles_swapped
    ),
    "nibbles swapped, NVFP4": faulty(
        "nvfp4-pack-quantized", "weight_packed", m.nibbles_swapped, m.nibbles_swapped
    ),
    "octets turned, MXFP6": faulty(
        "mxfp6-pack-quantized", "weight_packed", lambda x: x.flip(-1), lambda x: x.flip(-1)
    ),
    "signs turned": faulty("mxfp4-pack-quantized", "weight_packed", m.signs_swapped, m.signs_swapped),
    "sign lost": faulty("mxfp8-quantized", "weight", lambda x: x & 0x7F, lambda x: x),
    "global scale missing": faulty(
        "nvfp4-pack-quantized", "weight_global_scale", torch.ones_like, lambda x: x
    ),
    "global scale is its inverse": faulty(
        "nvfp4-pack-quantized", "weight_global_scale", lambda x: 1 / x, lambda x: 1 / x
    ),
    "block scales transposed": faulty("float-quantized", "weight_scale", lambda x: x.t(), lambda x: x.t()),
    "scales of the next group": faulty(
        "mxfp8-quantized", "weight_scale", lambda x: x.roll(1, -1), lambda x: x.roll(-1, -1)
    ),
}


@pytest.mark.parametrize("fault", WRONG_LAYOUTS)
def test_the_layout_kit_finds(fault):
    form, layout = WRONG_LAYOUTS[fault]
    fmt, shape = LAYOUTS[form]
    with pytest.raises(ConformanceError):
        check_float_layout(layout, form, fmt, shape)


@pytest.mark.parametrize("spec", list(kernel_kit.float_specs()), ids=lambda spec: spec.fmt.name)
def test_the_kernel_kit_passes_the_reference(spec):
    for check in kernel_kit.CHECKS:
        check(TorchKernel(), spec)


def float32(fmt, shape=(64, 128)):
    return LinearSpec(fmt, shape, torch.float32, "cpu")


KERNELS = {
    "exponent one more": (MXFP4, m.with_part("exponent", lambda e: e + 1)),
    "exponent of a float step one more": (ROWS, m.with_part("step", lambda s: s * 2)),
    "scale rounded down": (NVFP4, m.with_part("block", lambda b: (b.int() - 1).clamp_min(0).to(torch.uint8))),
    "nibbles swapped": (MXFP4, m.with_codes(m.neighbours_swapped)),
    "sign lost": (NVFP4, m.with_codes(lambda codes: codes & 7)),
    "global scale missing": (NVFP4, m.with_part("tensor", torch.ones_like)),
    "block scales transposed": (fp8_format(FP8_BLOCK), m.with_part("step", lambda s: s.t().contiguous())),
}


@pytest.mark.parametrize("fault", KERNELS)
def test_the_kernel_kit_finds(fault):
    fmt, change = KERNELS[fault]
    spec = float32(fmt, SQUARE if fmt.group.rows > 1 else (64, 128))
    kernel = m.FaultyKernel(fault=change)
    for check in (kernel_kit.check_exact, kernel_kit.check_bound, kernel_kit.check_restore):
        with pytest.raises(AssertionError):
            check(kernel, spec)
