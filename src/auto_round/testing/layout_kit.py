"""Conformance kit for layouts: any row of the table has to pass `check_layout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor
from auto_round.numerics.scale_integer import MinMax
from auto_round.testing.failure import require
from auto_round.testing.slow_float_reader import read_float_weight
from auto_round.testing.slow_reader import PACKINGS, StoredAs, read_weight


def random_qtensor(fmt: Format, shape: Sequence[int], seed: int, *, positive: bool = False) -> QTensor:
    """Quantized tensor `[out, in]` with every kind of code, step and zero point.

    Args:
        fmt: a whole-number format with a step for each row and group.
        shape: `[out, in]`.
        seed: of the generator.
        positive: no negative steps.
    """
    generator = torch.Generator().manual_seed(seed)
    top = 1 << fmt.grid.bits
    codes = torch.randint(0, top, tuple(shape), generator=generator).to(torch.uint8)
    groups = fmt.group.scale_shape(shape)
    parts = dict(fmt.quantize(torch.randn(tuple(shape), generator=generator)).scale.parts)
    step = torch.randn(groups, generator=generator)
    parts["step"] = (step.abs() if positive else step).to(parts["step"].dtype)
    if isinstance(fmt.rule, MinMax):
        parts["zero"] = torch.randint(0, top, groups, generator=generator).to(torch.uint8)
    return QTensor(codes, fmt.rule.read(parts), fmt)


def check_layout(
    layout: Layout, packing_format: str, fmt: Format, shape: Sequence[int], *, seed: int = 0
) -> None:
    """Check every promise of a layout for one format and shape.

    Args:
        layout: the layout.
        packing_format: name under which readers know it: a key of `slow_reader.PACKINGS`.
        fmt: a format that it accepts for `shape`.
        shape: `[out, in]`.
        seed: of the random weight.

    Raises:
        ConformanceError: a promise is broken: `pack` returns what `spec` says, changes nothing and gives the
            same bytes each time; `unpack` gives back the same quantized tensor; and a reader that shares no
            code with the layout finds the same weights.
    """
    require(layout.accepts(fmt, shape) is None, f"{layout.name} refuses {fmt.name} {list(shape)}")
    order, zero_offset = PACKINGS[packing_format]
    # Where zero points are stored minus one, the sign of an asymmetric step says how a group is written.
    q = random_qtensor(fmt, shape, seed, positive=zero_offset == 1 and isinstance(fmt.rule, MinMax))
    parts = check_round_trip(layout, q)
    seen = read_weight(parts, StoredAs(order, zero_offset, fmt.grid.bits, fmt.group.size), shape)
    where = f"{layout.name} {fmt.name} {list(shape)}"
    require(torch.equal(seen, fmt.dequantize(q)), f"{where}: another reader finds other weights")


def check_float_layout(
    layout: Layout, form: str, fmt: Format, shape: Sequence[int], *, seed: int = 0
) -> None:
    """The same for floating weights as compressed-tensors stores them.

    Args:
        layout: the layout.
        form: name under which readers know it: a key of `slow_float_reader.STORED`.
        fmt: a floating format that it accepts for `shape`.
        shape: `[out, in]`.
        seed: of the random weight.

    Raises:
        ConformanceError: see `check_layout`.
    """
    require(layout.accepts(fmt, shape) is None, f"{layout.name} refuses {fmt.name} {list(shape)}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 2, shape[0]).unsqueeze(-1)  # so that no two blocks have one scale
    columns = torch.logspace(0, 1, shape[1])
    q = fmt.quantize(torch.randn(tuple(shape), generator=generator) * rows * columns)
    parts = check_round_trip(layout, q)
    block = (fmt.group.rows, fmt.group.width(shape[1]))
    seen = read_float_weight(parts, form, shape, block)
    where = f"{layout.name} {fmt.name} {list(shape)}"
    require(torch.equal(seen, fmt.dequantize(q)), f"{where}: another reader finds other weights")


def check_round_trip(layout: Layout, q: QTensor) -> Mapping[str, Tensor]:
    """Check that a layout packs as announced and unpacks what it packed; returns what it packed.

    Raises:
        ConformanceError: it does not.
    """
    fmt, shape = q.format, q.shape
    before = {"codes": q.codes.clone()} | {name: part.clone() for name, part in q.scale.parts.items()}
    parts = layout.pack(q)
    where = f"{layout.name} {fmt.name} {list(shape)}"
    require(_same(before, {"codes": q.codes, **q.scale.parts}), f"{where}: pack changed its argument")
    require(_same(parts, layout.pack(q)), f"{where}: packing twice gives other bytes")
    _check_spec(where, parts, layout, fmt, shape)
    back = layout.unpack(parts, fmt, shape)
    require(torch.equal(back.codes, q.codes), f"{where}: unpack gives other codes")
    require(back.codes.dtype == torch.uint8, f"{where}: unpacked codes are not uint8")
    require(_same(back.scale.parts, q.scale.parts), f"{where}: unpack gives another scale")
    require(torch.equal(back.scale.step, q.scale.step), f"{where}: unpack gives other steps")
    require(back.format == fmt, f"{where}: unpack gives another format")
    return parts


def _check_spec(
    where: str, parts: Mapping[str, Tensor], layout: Layout, fmt: Format, shape: Sequence[int]
) -> None:
    spec = layout.spec(fmt, shape)
    require(list(parts) == list(spec), f"{where}: pack gives {list(parts)}, spec {list(spec)}")
    for suffix, part in parts.items():
        want = spec[suffix]
        require(
            (part.dtype, tuple(part.shape)) == (want.dtype, tuple(want.shape)),
            f"{where}: {suffix} is {part.dtype} {list(part.shape)}, spec says {want}",
        )
        require(part.is_contiguous(), f"{where}: {suffix} is not contiguous")


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(_octets(a[k]), _octets(b[k])) for k in a
    )


def _octets(x: Tensor) -> Tensor:
    """Bytes of a tensor: PyTorch does not compare all of its dtypes."""
    return x.contiguous().view(torch.uint8)
