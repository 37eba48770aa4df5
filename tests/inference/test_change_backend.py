"""A loaded model can be handed to other kernels without a changed bit."""

from __future__ import annotations

import torch

from auto_round.inference.qlinear import QuantLinear
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.layouts.table import layout_for
from auto_round.numerics.presets import int_format


def test_change_of_kernel_keeps_codes_and_steps() -> None:
    fmt = int_format(4, 64, sym=False)
    spec = LinearSpec(fmt, (64, 128), torch.bfloat16, "cpu")
    layout = layout_for("auto_round")
    layer = QuantLinear(spec, layout, select_kernel(spec, "torch"), None)
    q = fmt.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
    layer.to_empty(device="cpu")
    for name, part in layout.pack(q).items():
        layer.get_buffer(name).copy_(part)
    layer.adopt(layer.kernel, spec)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = layer(x)
    other = select_kernel(spec, "auto")
    layer.change_kernel(other, spec)
    assert layer.kernel is other
    restored = layer.restore().weight
    assert torch.equal(restored.codes, q.codes)
    assert torch.equal(restored.scale.step, q.scale.step)
    layer.change_kernel(select_kernel(spec, "torch"), spec)
    assert torch.equal(layer(x), before)
