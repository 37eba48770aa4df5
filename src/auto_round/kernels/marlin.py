"""The `marlin` kernel: symmetric 4- and 8-bit weights through the Marlin programs of an installed GPTQModel.

Source: GPTQModel 5 `gptqmodel/utils/marlin.py` (`gptq_marlin_repack`, `marlin_permute_scales`,
`apply_gptq_marlin_linear`). Not tried with the package by this version: it is taken only when named, and
every kind of layer is tried before it is used (`kernels/check.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import Refusal
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.reference import PART
from auto_round.kernels.tiles import TileOrder
from auto_round.layouts import integers
from auto_round.layouts.bits import pack_columns
from auto_round.numerics.qtensor import QTensor

BITS = (4, 8)
GROUPS = (-1, 32, 64, 128)
TILE = (64, 16)
"""Outputs and inputs of the tiles that Marlin permutes."""

IN_MULTIPLE = 128
"""Inputs must be a multiple: Marlin's smallest share of them for one block of threads."""

INSTALL = "pip install gptqmodel"


@dataclass(frozen=True, slots=True)
class MarlinKernel:
    """Marlin through GPTQModel; codes are kept exactly, steps are rounded to the dtype of the activations."""

    name: str = "marlin"

    def refuses(self, spec: LinearSpec) -> Refusal | None:
        """None for symmetric 4- and 8-bit formats and 16-bit activations on cuda, with GPTQModel."""
        if spec.device != "cuda":
            return Refusal(self.name, f"runs on cuda, not on {spec.device}")
        refusal = self._refuses_weight(spec)
        if refusal is not None:
            return refusal
        if spec.dtype not in (torch.bfloat16, torch.float16):
            return Refusal(self.name, f"takes bfloat16 or float16 activations, not {spec.dtype}")
        return self._refuses_machine(spec)

    def _refuses_weight(self, spec: LinearSpec) -> Refusal | None:
        refusal = integers.refuse(self.name, spec.fmt, spec.shape, BITS)
        if refusal is not None:
            return refusal
        if not integers.is_symmetric(spec.fmt):
            return Refusal(self.name, f"holds symmetric weights, not {spec.fmt.name}", 'use backend="triton"')
        n_out, n_in = spec.shape
        if spec.fmt.group.size not in GROUPS or n_in % spec.fmt.group.width(n_in):
            return Refusal(
                self.name, f"takes groups of {GROUPS} that divide a row, not {spec.fmt.group.size}"
            )
        if n_out % TILE[0] or n_in % IN_MULTIPLE:
            return Refusal(
                self.name, f"needs multiples of [{TILE[0]}, {IN_MULTIPLE}], not {list(spec.shape)}"
            )
        return None

    def _refuses_machine(self, spec: LinearSpec) -> Refusal | None:
        if importlib.util.find_spec("gptqmodel") is None:
            return Refusal(self.name, "GPTQModel is not installed", INSTALL)
        try:
            reason = str(_library().marlin_runtime_error(spec.dtype))
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            return Refusal(
                self.name, f"this GPTQModel has other interfaces ({error})", f"{INSTALL} --upgrade"
            )
        return Refusal(self.name, f"GPTQModel says: {reason}") if reason else None

    def compute_dtype(self, spec: LinearSpec) -> torch.dtype:
        """That of the activations."""
        return spec.dtype

    def prepare(self, q: QTensor, spec: LinearSpec) -> Mapping[str, Tensor]:
        """Marlin's words, steps and workspace, and the scale's parts as stored."""
        library = _library()
        n_out, n_in = spec.shape
        step = q.scale.parts["step"].t().to(spec.dtype).contiguous()
        size = -1 if spec.fmt.group.width(n_in) == n_in else spec.fmt.group.size
        return {
            "words": _pack(q.codes, spec.fmt.grid.bits, spec.dtype),
            "scales": library.marlin_permute_scales(step, size_k=n_in, size_n=n_out, group_size=size),
            "workspace": library.marlin_make_workspace_new(q.codes.device),
            "nothing": torch.empty(0, dtype=torch.int32, device=q.codes.device),
            **{PART + name: part for name, part in q.scale.parts.items()},
        }

    def restore(self, buffers: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Inverse of `prepare`."""
        words = buffers["words"]
        parts = {name.removeprefix(PART): b for name, b in buffers.items() if name.startswith(PART)}
        codes = _order(spec.fmt.grid.bits, spec.dtype, words.device).unpack(words, spec.shape)
        return QTensor(codes, spec.fmt.rule.read(parts), spec.fmt)

    def linear(
        self, x: Tensor, buffers: Mapping[str, Tensor], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """`x W^T + bias`, partial sums added in float32."""
        n_out, n_in = spec.shape
        nothing = buffers["nothing"]
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], n_out)
        y: Tensor = _library().apply_gptq_marlin_linear(
            input=x.contiguous(),
            weight=buffers["words"],
            weight_scale=buffers["scales"],
            weight_zp=nothing,
            g_idx=nothing,
            g_idx_sort_indices=nothing,
            workspace=buffers["workspace"],
            wtype=_code_type(spec.fmt.grid.bits),
            output_size_per_partition=n_out,
            input_size_per_partition=n_in,
            is_k_full=True,
            bias=None,
            use_fp32_reduce=True,
        )
        return y if bias is None else y + bias


def _library() -> ModuleType:
    return importlib.import_module("gptqmodel.utils.marlin")


def _code_type(bits: int) -> Any:
    types = importlib.import_module("gptqmodel.utils.marlin_scalar_type").scalar_types
    return types.uint4b8 if bits == 4 else types.uint8b128


def _pack(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    n_out, n_in = codes.shape
    nothing = torch.empty(0, dtype=torch.int32, device=codes.device)
    words: Tensor = _library().gptq_marlin_repack(
        pack_columns(codes, bits), nothing, n_in, n_out, bits, dtype
    )
    return words


@functools.cache
def _order(bits: int, dtype: torch.dtype, device: torch.device) -> TileOrder:
    def pack(tile: Tensor) -> Tensor:  # the operator wants 128 inputs: the tile is the first of them
        repeated = tile.repeat(1, IN_MULTIPLE // TILE[1])
        return _pack(repeated, bits, dtype).flatten().chunk(IN_MULTIPLE // TILE[1])[0]

    return TileOrder.read(pack, TILE, bits, inputs_first=True, device=device)
