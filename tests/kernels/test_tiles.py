"""Tiled orders of GPU operators, on stand-ins with the operators' interfaces that run on a CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from auto_round.kernels import cuda_int4, marlin
from auto_round.kernels.cuda_int4 import CudaInt4Kernel
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.marlin import MarlinKernel
from auto_round.kernels.tiles import TileOrder
from auto_round.layouts.bits import unpack_bits
from auto_round.numerics.presets import int_format
from auto_round.testing import kernel_kit

G = torch.Generator().manual_seed(5)
PERMUTATIONS = {n: torch.randperm(n, generator=G) for n in (256, 512, 1024)}


def tiled(codes, rows, columns, *, inputs_first, bits):
    """Tiles one after another, permuted inside, as bytes."""
    down, across = codes.shape[0] // rows, codes.shape[1] // columns
    tiles = codes.view(down, rows, across, columns)
    tiles = tiles.permute(2, 0, 1, 3) if inputs_first else tiles.permute(0, 2, 1, 3)
    fields = tiles.reshape(-1, rows * columns)[:, PERMUTATIONS[rows * columns]].flatten()
    return fields.contiguous() if bits == 8 else fields[::2] | (fields[1::2] << 4)


def untiled(packed, shape, rows, columns, *, inputs_first, bits):
    """Inverse of `tiled`, written from it alone."""
    places = tiled_numbers = torch.arange(shape[0] * shape[1]).view(shape)
    down, across = shape[0] // rows, shape[1] // columns
    tiles = tiled_numbers.view(down, rows, across, columns)
    tiles = tiles.permute(2, 0, 1, 3) if inputs_first else tiles.permute(0, 2, 1, 3)
    places = tiles.reshape(-1, rows * columns)[:, PERMUTATIONS[rows * columns]].flatten()
    fields = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], 1).flatten()
    codes = torch.empty(shape[0] * shape[1], dtype=torch.uint8)
    codes[places] = fields
    return codes.view(shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs_first", [True, False])
def test_orders_are_read_back(bits, inputs_first):
    def pack(codes):
        return tiled(codes, 64, 16, inputs_first=inputs_first, bits=bits)

    order = TileOrder.read(pack, (64, 16), bits, inputs_first=inputs_first, device=torch.device("cpu"))
    codes = torch.randint(0, 1 << bits, (192, 80), generator=G, dtype=torch.uint8)
    assert torch.equal(order.unpack(pack(codes), (192, 80)), codes)
    wrong = replace(order, inputs_first=not inputs_first)
    assert not torch.equal(wrong.unpack(pack(codes), (192, 80)), codes)


def test_operators_that_lose_codes_are_found():
    with pytest.raises(ValueError, match="permute"):
        TileOrder.read(
            lambda c: c.clamp(max=7).flatten(), (8, 16), 8, inputs_first=False, device=torch.device("cpu")
        )
    with pytest.raises(ValueError, match="expected 128"):
        TileOrder.read(lambda c: c[:4].flatten(), (8, 16), 8, inputs_first=False, device=torch.device("cpu"))


def tinygemm_pack(pairs, inner):
    codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1)
    return tiled(codes, 8, 16 * inner, inputs_first=False, bits=4).view(torch.int32)


def tinygemm(x, packed, width, scale_zero):
    """Weights rounded to bfloat16, sums in float32: the operator as its source has it."""
    n_out, n_in = scale_zero.shape[1], x.shape[1]
    inner = next(i for i in (8, 4, 2) if n_in % (16 * i) == 0)
    codes = untiled(packed.view(torch.uint8), (n_out, n_in), 8, 16 * inner, inputs_first=False, bits=4)
    step, fold = (p.t().float().repeat_interleave(width, 1) for p in scale_zero.unbind(-1))
    w = ((codes.float() - 8) * step + fold).bfloat16().float()
    return (x.float() @ w.t()).bfloat16()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("size", "shape"), [(32, (16, 96)), (128, (24, 384)), (-1, (8, 64)), (0, (16, 128))])
def test_int4_on_cuda(monkeypatch, bits, sym, size, shape):
    operators = SimpleNamespace(_convert_weight_to_int4pack=tinygemm_pack, _weight_int4pack_mm=tinygemm)
    fake = SimpleNamespace(
        **{n: getattr(torch, n) for n in ("bfloat16", "device")}, ops=SimpleNamespace(aten=operators)
    )
    monkeypatch.setattr(cuda_int4, "torch", fake)
    cuda_int4._order.cache_clear()
    spec = LinearSpec(int_format(bits, size, sym=sym), shape, torch.bfloat16, "cpu")
    for check in kernel_kit.CHECKS:
        check(CudaInt4Kernel(), spec)
    cuda_int4._order.cache_clear()


def marlin_library():
    """GPTQModel's functions by name and arguments, weights permuted in some way."""
    library = ModuleType("gptqmodel.utils.marlin")

    def repack(words, perm, size_k, size_n, num_bits, dtype):
        assert perm.numel() == 0
        assert words.shape == (size_k * num_bits // 32, size_n)
        codes = unpack_bits(words.t().contiguous(), num_bits)
        return tiled(codes, 64, 16, inputs_first=True, bits=num_bits).view(torch.int32).view(size_k // 16, -1)

    def gemm(**a):
        bits = {"u4": 4, "u8": 8}[a["wtype"]]
        shape = (a["output_size_per_partition"], a["input_size_per_partition"])
        codes = untiled(a["weight"].view(torch.uint8).flatten(), shape, 64, 16, inputs_first=True, bits=bits)
        step = a["weight_scale"].flip(1).t().float()
        step = step.repeat_interleave(shape[1] // step.shape[1], dim=1)
        w = (codes.float() - (1 << (bits - 1))) * step
        return (a["input"].float() @ w.t()).to(a["input"].dtype)

    library.gptq_marlin_repack = repack
    library.marlin_permute_scales = lambda s, size_k, size_n, group_size: s.flip(1)
    library.marlin_make_workspace_new = lambda device: torch.zeros(4, dtype=torch.int32)
    library.apply_gptq_marlin_linear = gemm
    library.marlin_runtime_error = lambda dtype: ""
    return library


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "shape"), [(32, (64, 128)), (128, (128, 256)), (-1, (64, 128))])
def test_marlin(monkeypatch, bits, size, shape):
    types = ModuleType("gptqmodel.utils.marlin_scalar_type")
    types.scalar_types = SimpleNamespace(uint4b8="u4", uint8b128="u8")
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.marlin", marlin_library())
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.marlin_scalar_type", types)
    marlin._order.cache_clear()
    spec = LinearSpec(int_format(bits, size, sym=True), shape, torch.float16, "cpu")
    for check in kernel_kit.CHECKS:
        check(MarlinKernel(), spec)
    marlin._order.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cpu"}, "runs on cuda"),
        ({"fmt": int_format(3, 128, sym=True)}, "4 or 8"),
        ({"fmt": int_format(4, 128, sym=False)}, "symmetric"),
        ({"fmt": int_format(4, 256, sym=True)}, "groups"),
        ({"shape": (96, 256)}, "multiples"),
        ({"dtype": torch.float32}, "float32"),
        ({}, "not installed"),
    ],
)
def test_marlin_refuses(monkeypatch, change, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spec = LinearSpec(int_format(4, 128, sym=True), (128, 256), torch.bfloat16, "cuda")
    assert message in str(MarlinKernel().refuses(replace(spec, **change)))


def test_other_versions_of_gptqmodel_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.marlin", ModuleType("gptqmodel.utils.marlin"))
    spec = LinearSpec(int_format(4, 128, sym=True), (128, 256), torch.bfloat16, "cuda")
    assert "other interfaces" in str(MarlinKernel().refuses(spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cpu"}, "runs on cuda"),
        ({"fmt": int_format(5, 128, sym=True)}, "2 to 4 bits"),
        ({"dtype": torch.float16}, "float16"),
        ({"shape": (12, 256)}, "outputs of 8"),
        ({"fmt": int_format(4, 48, sym=True)}, "groups of 48"),
    ],
)
def test_int4_on_cuda_refuses(change, message):
    spec = LinearSpec(int_format(4, 128, sym=True), (128, 256), torch.bfloat16, "cuda")
    assert message in str(CudaInt4Kernel().refuses(replace(spec, **change)))
