"""Kernels on a GPU: every one, width and group against the exact result, and how models call them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from accelerator import DEVICE, NEEDED, REHEARSED, fewer, needs_cuda
from auto_round.kernels.check import error_bound
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.table import KERNELS
from auto_round.numerics.presets import int_format
from auto_round.testing import kernel_kit

pytestmark = NEEDED

NAMES = ("triton", "torch_int4", "torch", "marlin")
HALF = torch.float16 if REHEARSED else torch.bfloat16  # the interpreter cannot multiply tiles of bfloat16
ODD = {32: (19, 96), 128: (16, 200), -1: (21, 60), 0: (8, 64), 48: (18, 112), 100: (33, 300)}
"""Group size -> shape: odd numbers of outputs, short last groups, rows that do not fill words or blocks."""
LARGE = ((4096, 14336), (14336, 4096), (1024, 4096), (1000, 1536))
PATHS = (1, 2, 17, 129)
"""Tokens of a call, one for each path of the Triton kernel."""


def layer(bits=4, size=32, shape=(64, 256), dtype=HALF, *, sym=True):
    return LinearSpec(int_format(bits, size, sym=sym), shape, dtype, DEVICE)


def every_width():
    specs = list(kernel_kit.specs(DEVICE))
    half = [layer(bits, dtype=torch.float16, sym=sym) for bits in range(2, 9) for sym in (True, False)]
    odd = [layer(bits, size, shape, sym=bits % 2 == 0) for bits in range(2, 9) for size, shape in ODD.items()]
    return [*half, *odd] if REHEARSED else [*specs, *half, *odd]


def named(spec):
    return f"{spec.fmt.name}-{'x'.join(map(str, spec.shape))}-{str(spec.dtype)[6:]}"


CASES = [
    pytest.param(name, spec, id=f"{name}-{named(spec)}") for name in NAMES for spec in fewer(every_width(), 3)
]


@pytest.fixture(autouse=True)
def _sums_in_float32(monkeypatch):
    """cuBLAS may add partial sums in 16 bits, which no exact result survives."""
    if not REHEARSED:
        matmul = torch.backends.cuda.matmul
        monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", False)
        monkeypatch.setattr(matmul, "allow_fp16_reduced_precision_reduction", False)


def usable(name, spec):
    """The kernel of that name; the test is skipped where it does not take the layer."""
    kernel = KERNELS[name].kernel
    if refusal := kernel.refuses(spec):
        pytest.skip(str(refusal))
    return kernel


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_kit(name, spec):
    kernel = usable(name, spec)
    kernel_kit.check_restore(kernel, spec)
    kernel_kit.check_bound(kernel, spec)
    if name != "torch":  # its sums are those of PyTorch
        kernel_kit.check_exact(kernel, spec)


@needs_cuda
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_real_sizes(name, shape):
    """Tiles, splits and bands that small layers never reach."""
    for sym in (True, False):
        spec = layer(4, 128, shape, sym=sym)
        kernel = usable(name, spec)
        q = kernel_kit.random_case(spec)
        buffers, w = kernel.prepare(q, spec), spec.fmt.dequantize(q).double()
        for tokens in (*PATHS, 64, 300):
            x = torch.randn(tokens, shape[1], device=DEVICE).to(spec.dtype)
            y = x.double() @ w.t()
            error = (kernel.linear(x, buffers, spec, None).double() - y).abs()
            assert bool((error <= error_bound(kernel, spec, q, x, y)).all()), (tokens, sym)


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_any_shape(name):
    """Rows apart in memory, more than two dimensions, and no token at all."""
    spec = layer(shape=(64, 128))
    kernel = usable(name, spec)
    q = kernel_kit.exact_case(spec)
    buffers, w = kernel.prepare(q, spec), spec.fmt.dequantize(q)
    x = torch.arange(2 * 3 * 128, device=DEVICE).view(2, 3, 128).remainder(3).to(spec.dtype)
    wide = torch.cat([x, x + 1], dim=-1)
    for given in (x, x[:, 1], x.transpose(0, 1), x[:1].expand(2, 3, 128), wide[..., 128:], x[:0], x[0, 0]):
        want = (given.float() @ w.t()).to(spec.dtype)
        got = kernel.linear(given, buffers, spec, None)
        assert got.shape == want.shape
        assert torch.equal(got, want)


@needs_cuda
@pytest.mark.parametrize("tokens", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_calls_can_be_replayed(name, tokens):
    """A CUDA graph of a call reads whatever lies in its input by then."""
    spec = layer(shape=(256, 512))
    kernel = usable(name, spec)
    buffers = kernel.prepare(kernel_kit.random_case(spec), spec)
    x = torch.randn(tokens, 512, device=DEVICE).to(spec.dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernel.linear(x, buffers, spec, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, buffers, spec, None)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.allclose(y, kernel.linear(x, buffers, spec, None), rtol=0.02, atol=0.02)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("tokens", PATHS)
@pytest.mark.parametrize("name", ["triton", "torch_int4"])
def test_compiled_calls(name, tokens):
    """`torch.compile` takes a call as it is, without a break in its graph."""
    spec = layer(shape=(64, 128), sym=False)
    kernel = usable(name, spec)
    buffers = kernel.prepare(kernel_kit.random_case(spec), spec)
    x = torch.randn(tokens, 128, device=DEVICE).to(spec.dtype)
    bias = torch.randn(64, device=DEVICE).to(spec.dtype)

    def call(given):
        return kernel.linear(given + 1, buffers, spec, bias) * 2

    backend = "aot_eager" if REHEARSED else "inductor"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.allclose(compiled(x), call(x), rtol=0.02, atol=0.02)
