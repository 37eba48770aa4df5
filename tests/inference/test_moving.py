"""`model.to(...)` after loading: dtypes of packed tensors never change, and what cannot run is refused."""

from __future__ import annotations

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.inference.qlinear import QuantLinear
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.layouts.table import layout_for
from auto_round.numerics.presets import int_format


def loaded(backend):
    fmt = int_format(4, 64, sym=False)
    spec = LinearSpec(fmt, (64, 128), torch.bfloat16, "cpu")
    layout = layout_for("auto_round")
    bias = torch.nn.Parameter(torch.arange(64).bfloat16(), requires_grad=False)
    layer = QuantLinear(spec, layout, select_kernel(spec, backend), bias, backend)
    q = fmt.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)))
    for name, part in layout.pack(q).items():
        layer.register_buffer(name, part)
    layer.adopt(layer.kernel, spec)
    return layer, q


@pytest.mark.parametrize("backend", ["torch", "cpu_int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype(backend, dtype):
    layer, q = loaded(backend)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert layer.to(dtype) is layer
    assert layer.bias.dtype == dtype
    assert layer.spec.dtype == dtype
    for name, b in layer.named_buffers():
        assert b.dtype == before[name].dtype
        assert torch.equal(b, before[name])
    assert torch.equal(layer.restore().weight.codes, q.codes)
    assert torch.equal(layer.restore().weight.scale.step, q.scale.step)
    y = layer(x)
    assert y.dtype == dtype
    want = x.double() @ q.format.dequantize(q).double().t() + layer.bias.double()
    assert (y.double() - want).abs().max() < 0.02 * want.abs().max()


def test_what_the_kernel_does_not_take_is_refused():
    layer, _ = loaded("cpu_int4")
    before = dict(layer.named_buffers())
    with pytest.raises(UnsupportedError, match=r"(?s)device_map.*takes bfloat16"):
        layer.to(torch.float64)
    assert all(torch.equal(b, dict(layer.named_buffers())[n]) for n, b in before.items())


def test_without_a_named_backend_the_kernel_is_chosen_anew():
    """As if it had been loaded so: float32 is not computed in bfloat16, and nothing is refused."""
    layer, q = loaded("auto")
    first = layer.kernel
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        assert layer.kernel.name == "torch"
        x = torch.randn(3, 128, dtype=dtype)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    layer.to(torch.bfloat16)
    assert layer.kernel == first
    assert torch.equal(layer.restore().weight.codes, q.codes)
    assert torch.equal(layer.restore().weight.scale.step, q.scale.step)


def test_before_loading_tensors_move_freely():
    fmt = int_format(4, 64, sym=True)
    spec = LinearSpec(fmt, (64, 128), torch.bfloat16, "cpu")
    layer = QuantLinear(spec, layout_for("auto_round"), select_kernel(spec, "torch"), None)
    assert layer.to_empty(device="cpu").qweight.device.type == "cpu"


def test_offloading_is_refused(monkeypatch):
    from auto_round.inference import convert_model

    model = torch.nn.ModuleDict()
    for name, device in (("a", "cpu"), ("b", "cpu"), ("c", "cuda")):
        layer = torch.nn.Module()
        layer.adopted = False
        layer.parts = lambda device=device: {"qweight": FakeTensor(device)}
        model[name] = layer
    monkeypatch.setattr(convert_model, "QuantLinear", torch.nn.Module)
    model.adopted = True
    with pytest.raises(UnsupportedError, match=r"(?s)2 quantized layers.*\(a, b\).*offload"):
        convert_model._check_devices(model)


class FakeTensor:
    """A tensor of which only the device is looked at."""

    def __init__(self, kind):
        self.device = torch.device(kind)
