"""The Triton programs in Triton's interpreter on a CPU: equal to the exact result, on every path.

The interpreter is switched on before Triton is imported, hence `test_triton_linear.py` runs this file in a
process of its own. It rounds float32 to bfloat16 towards zero and cannot multiply tiles of bfloat16, so that
bfloat16 is compared where nothing is rounded and nothing multiplied by tiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from auto_round.inference.qlinear import QuantLinear
from auto_round.kernels import triton_table
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.triton_linear import TritonKernel
from auto_round.layouts.table import layout_for
from auto_round.numerics.presets import int_format
from auto_round.numerics.qtensor import QTensor
from auto_round.testing import kernel_kit

KERNEL = TritonKernel()
PATHS = ("one token", "several tokens", "unpacked")
SHAPES = {32: (19, 96), 128: (16, 200), -1: (21, 60), 0: (8, 64), 48: (18, 112)}
"""Group size -> shape: odd numbers of outputs, short last groups, rows that do not fill words."""


def specs(widths=(2, 3, 4, 8), dtype=torch.float16):
    """Every width with every group; one group in five of each without the mark `slow`."""
    found = []
    for row, (bits, sym) in enumerate(itertools.product(widths, (True, False))):
        for column, (size, shape) in enumerate(SHAPES.items()):
            spec = LinearSpec(int_format(bits, size, sym=sym), shape, dtype, "cpu")
            marks = () if (2 * row + column) % len(SHAPES) == 0 else pytest.mark.slow
            found.append(pytest.param(spec, marks=marks, id=f"{spec.fmt.name}-{spec.dtype}"))
    return found


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Send every number of tokens along one path, in tiles that make few programs."""
    most = {"one token": (1 << 30, 1 << 30), "several tokens": (0, 1 << 30), "unpacked": (0, 0)}[
        request.param
    ]
    monkeypatch.setattr(triton_table, "DECODE_TOKENS", most[0])
    monkeypatch.setattr(triton_table, "FUSED_TOKENS", most[1])
    monkeypatch.setattr(triton_table, "DECODE", ((1 << 62, triton_table.Tile(16, 32, 1, 4, 1)),))
    monkeypatch.setattr(triton_table, "PREFILL", ((1 << 62, triton_table.Tile(16, 32, 16, 4, 1)),))
    monkeypatch.setattr(triton_table, "UNPACK", triton_table.Tile(16, 32, 1, 4, 1))
    return request.param


def exact(kernel, spec, tokens=(3,), seed=0):
    """Whole numbers as activations and powers of two as steps: the result, rounded once."""
    q = kernel_kit.exact_case(spec, seed)
    buffers = kernel.prepare(q, spec)
    w = spec.fmt.dequantize(q, torch.float64)
    g = torch.Generator().manual_seed(seed + 1)
    for count in tokens:
        x = torch.randint(-2, 3, (count, spec.shape[1]), generator=g).to(spec.dtype)
        bias = torch.randint(-8, 9, (spec.shape[0],), generator=g).to(spec.dtype)
        want = (x.double() @ w.t() + bias.double()).to(spec.dtype)
        got = kernel.linear(x, buffers, spec, bias)
        assert got.dtype == spec.dtype
        assert torch.equal(got, want), f"{int((got != want).sum())} of {want.numel()}"


@pytest.mark.parametrize("spec", specs())
def test_exact(spec, path):
    exact(KERNEL, spec)


@pytest.mark.parametrize("spec", specs((4,), torch.bfloat16))
def test_every_weight_in_bfloat16(spec, path):
    """Unit vectors as activations: each result is one weight, which bfloat16 holds."""
    if path == "several tokens":
        pytest.skip("the interpreter cannot multiply tiles of bfloat16")
    n_in = 8 if path == "one token" else spec.shape[1]
    q = kernel_kit.exact_case(spec)
    x = torch.eye(spec.shape[1], dtype=torch.bfloat16)[:n_in]
    got = KERNEL.linear(x, KERNEL.prepare(q, spec), spec, None)
    assert torch.equal(got.float(), spec.fmt.dequantize(q).t()[:n_in])


@pytest.mark.parametrize(
    "bits", [pytest.param(5, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow), 7]
)
def test_other_widths(bits, path):
    exact(KERNEL, LinearSpec(int_format(bits, 32, sym=False), (16, 96), torch.float16, "cpu"))


def test_split_inputs(path):
    tokens = (1, 3) if path == "one token" else (3, 17)  # that path runs a program for each token
    exact(KERNEL, LinearSpec(int_format(8, 64, sym=False), (16, 640), torch.float16, "cpu"), tokens=tokens)


def test_shapes_of_activations(path):
    spec = LinearSpec(int_format(4, 32, sym=True), (16, 64), torch.float16, "cpu")
    q = kernel_kit.exact_case(spec)
    buffers, w = KERNEL.prepare(q, spec), spec.fmt.dequantize(q)
    x = torch.arange(2 * 3 * 64).view(2, 3, 64).remainder(3).half()
    for given in (x, x[:, 1], x.transpose(0, 1), x[..., ::1].expand(2, 3, 64), x[:0]):
        want = (given.float() @ w.t()).half()
        assert torch.equal(KERNEL.linear(given, buffers, spec, None), want)
    wide = torch.cat([x, x + 1], dim=-1)
    assert torch.equal(KERNEL.linear(wide[..., :64], buffers, spec, None), (x.float() @ w.t()).half())


def test_gradients_pass_through(path):
    """What lies before a layer learns as it would before the dequantized one."""
    found = []
    for inner in layer_and_dense():
        x = torch.arange(3 * 64).view(3, 64).remainder(3).half().requires_grad_()
        inner(x).float().square().mean().backward()
        found.append(x.grad)
    assert bool(found[1].abs().sum() > 0)
    assert torch.allclose(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_gradients_reach_adapters(path):
    """An adapter of PEFT around a layer learns as it would around the dequantized one."""
    peft = pytest.importorskip("peft")
    found = []
    for inner in layer_and_dense():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        net = torch.nn.Sequential(
            inner, torch.nn.LayerNorm(32, dtype=torch.float16)
        )  # PEFT wants a parameter
        model = peft.get_peft_model(net, config, autocast_adapter_dtype=False)
        x = torch.arange(3 * 64).view(3, 64).remainder(3).half().requires_grad_()
        model(x).float().square().mean().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for got, want in zip(*found, strict=True):
        assert bool(want.abs().sum() > 0)
        assert torch.allclose(got, want, rtol=1e-2, atol=1e-2)


def layer_and_dense():
    """A quantized layer, and the dense one of equal weights."""
    spec = LinearSpec(int_format(4, 32, sym=False), (32, 64), torch.float16, "cpu")
    layout, q = layout_for("auto_round"), kernel_kit.exact_case(spec)
    layer = QuantLinear(spec, layout, KERNEL, None, "triton").to_empty(device="cpu")
    for name, part in layout.pack(q).items():
        layer.get_buffer(name).copy_(part)
    layer.adopt(KERNEL, spec)
    dense = torch.nn.Linear(64, 32, bias=False, dtype=torch.float16)
    dense.weight.data = spec.fmt.dequantize(q, torch.float16)
    return layer, dense


@pytest.mark.parametrize("change", ["codes", "step", "zero"])
def test_mutants_fail(change, path):
    spec = LinearSpec(int_format(4, 32, sym=False), (16, 64), torch.float16, "cpu")

    class Wrong(TritonKernel):
        def prepare(self, q, spec):
            parts = dict(q.scale.parts)
            codes = q.codes.view(-1, 32, 2).flip(-1).view(16, 64) if change == "codes" else q.codes
            if change == "step":
                parts["step"] = parts["step"].roll(1, dims=-1)
            if change == "zero":
                parts["zero"] = parts["zero"] + 1
            return super().prepare(QTensor(codes, spec.fmt.rule.read(parts), spec.fmt), spec)

    exact(KERNEL, spec)
    with pytest.raises(AssertionError, match="of"):
        exact(Wrong(), spec)


@pytest.mark.parametrize("sym", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_operator_is_what_torch_compile_expects(sym):
    """Its schema, its shapes without data, and its place in compiled graphs."""
    spec = LinearSpec(int_format(4, 32, sym=sym), (16, 64), torch.float16, "cpu")
    buffers = KERNEL.prepare(kernel_kit.exact_case(spec), spec)
    x = torch.ones(2, 1, 64, dtype=torch.float16)
    weight = buffers["words"], buffers["part_step"], buffers.get("part_zero")
    torch.library.opcheck(torch.ops.auto_round.triton_linear.default, (x[:1], *weight, None, 16, 4, 32))
