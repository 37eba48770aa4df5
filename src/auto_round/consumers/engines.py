"""The table of engines: for each format of a folder how it is read, what is demanded, which kernels.

Facts as of the sources of vLLM 0.32, SGLang 0.5.23, GPTQModel 7 (`f4c327a17`), Transformers 5.23.
vLLM reads `auto-round` as `inc`. Its releases before 0.32 have no kernels for 2, 3, 5, 6 and 7 bits (those
before 2026 took 2 and 3 bits and zero points, too: ExLlama, which SGLang has dropped as well).
All sizes are those of one GPU (tensor parallel 1) of compute capability 8.0 or newer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from auto_round.consumers import kernels_gptqmodel, kernels_sglang
from auto_round.consumers.compressed import CompressedReader
from auto_round.consumers.demands import Demands
from auto_round.consumers.fields import Reading
from auto_round.consumers.kernels import MARLIN_GROUPS, KernelOf
from auto_round.consumers.kernels_float import vllm_inc_floats
from auto_round.consumers.kernels_vllm import vllm_awq, vllm_compressed, vllm_gptq, vllm_inc_gptq
from auto_round.consumers.modules import Module, fused_modules, split_modules
from auto_round.consumers.readers import AutoRoundReader, AWQReader, GPTQReader, read_awq_dynamic
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.layouts.table import PACKING_FORMAT
from auto_round.stored.matrices import AWQ, GPTQ, OTHER, Matrix

VLLM, SGLANG, GPTQMODEL = "vLLM", "SGLang", "GPTQModel"

AUTO_ROUND = "auto-round"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine and one kind of folder.

    Attributes:
        name: name of the engine.
        method: `quant_method` that this row is for.
        order: order of the packed codes that it is for; empty for every order.
        modules: matrices -> modules as the engine builds them.
        read: how it reads the configuration for one module.
        kernel: which kernel it takes.
        demands: what it insists on.
        source: where this is from.
    """

    name: str
    method: str
    order: str
    modules: Callable[[Iterable[Matrix]], tuple[Module, ...]]
    read: Reading
    kernel: KernelOf
    demands: Demands
    source: str


_PACKINGS = (PACKING_FORMAT, ("auto_round:auto_gptq", "auto_round:auto_awq"))
_BACKENDS = ("backend", ("auto", "gptq", "gptq:marlin", "awq", "awq:marlin", "marlin"))
_INTEGERS = (("data_type", ("int",)), _PACKINGS, _BACKENDS)
_INC = Demands(("bits", "group_size"), (("bits", (2, 3, 4, 5, 6, 7, 8)), *_INTEGERS), beside=True)
_INC_FLOATS = Demands(
    ("bits", "group_size"),
    (
        ("data_type", ("mx_fp",)),
        (PACKING_FORMAT, ("auto_round:llm_compressor",)),
        ("bits", (4, 8)),
        ("group_size", (32,)),
        ("sym", (True,)),
        ("backend", ("auto",)),
    ),
    beside=True,
)
_ROUTED = Demands(
    ("bits", "group_size", "sym"), (("bits", (2, 3, 4, 8)), *_INTEGERS, ("desc_act", (False,))), beside=True
)
_MARLIN_GPTQ = (("bits", (4, 8)), ("sym", (True,)), ("checkpoint_format", ("gptq", "gptq_v2")))
_GPTQ_KEYS = ("bits", "group_size", "desc_act", "sym")
_AWQ_KEYS = (("bits", "w_bit"), ("group_size", "q_group_size"), "zero_point")

_INC_SOURCE = "vllm-project/vllm vllm/model_executor/layers/quantization/inc/inc.py"
_ROUTED_SOURCE = "sgl-project/sglang python/sglang/srt/layers/quantization/auto_round.py"
_VLLM_READER = AutoRoundReader(re.search, ends=True)
_SGLANG_READER = AutoRoundReader(re.fullmatch, ends=False)

ENGINES: tuple[Engine, ...] = (
    Engine(VLLM, AUTO_ROUND, GPTQ, fused_modules, _VLLM_READER, vllm_inc_gptq, _INC, _INC_SOURCE),
    Engine(VLLM, AUTO_ROUND, AWQ, fused_modules, _VLLM_READER, vllm_awq, _INC, _INC_SOURCE),
    Engine(VLLM, AUTO_ROUND, OTHER, fused_modules, _VLLM_READER, vllm_inc_floats, _INC_FLOATS, _INC_SOURCE),
    Engine(
        VLLM,
        "gptq",
        GPTQ,
        fused_modules,
        GPTQReader(lists=True),
        vllm_gptq,
        Demands(_GPTQ_KEYS, _MARLIN_GPTQ),
        "vllm-project/vllm vllm/model_executor/layers/quantization/auto_gptq.py",
    ),
    Engine(
        VLLM,
        "awq",
        AWQ,
        fused_modules,
        AWQReader(parts=True),
        vllm_awq,
        Demands(_AWQ_KEYS, (("bits", (4,)), ("version", ("gemm",)))),
        "vllm-project/vllm vllm/model_executor/layers/quantization/auto_awq.py",
    ),
    Engine(
        VLLM,
        COMPRESSED_TENSORS,
        "",
        fused_modules,
        CompressedReader(strict=False),
        vllm_compressed,
        Demands(("config_groups",)),
        "vllm-project/vllm vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py",
    ),
    Engine(
        SGLANG,
        AUTO_ROUND,
        GPTQ,
        fused_modules,
        _SGLANG_READER,
        kernels_sglang.sglang_auto_round_gptq,
        _ROUTED,
        _ROUTED_SOURCE,
    ),
    Engine(
        SGLANG,
        AUTO_ROUND,
        AWQ,
        fused_modules,
        _SGLANG_READER,
        kernels_sglang.sglang_auto_round_awq,
        _ROUTED,
        _ROUTED_SOURCE,
    ),
    Engine(
        SGLANG,
        AUTO_ROUND,
        OTHER,
        fused_modules,
        _SGLANG_READER,
        kernels_sglang.sglang_auto_round_gptq,
        _ROUTED,
        _ROUTED_SOURCE,
    ),
    Engine(
        SGLANG,
        "gptq",
        GPTQ,
        fused_modules,
        GPTQReader(lists=False),
        kernels_sglang.sglang_gptq,
        Demands(_GPTQ_KEYS, (*_MARLIN_GPTQ, ("group_size", MARLIN_GROUPS))),
        "sgl-project/sglang python/sglang/srt/layers/quantization/gptq/gptq.py",
    ),
    Engine(
        SGLANG,
        "awq",
        AWQ,
        fused_modules,
        AWQReader(parts=False),
        kernels_sglang.sglang_awq,
        Demands(_AWQ_KEYS, (("bits", (4,)), ("version", ("gemm",)))),
        "sgl-project/sglang python/sglang/srt/layers/quantization/awq/awq.py",
    ),
    Engine(
        SGLANG,
        COMPRESSED_TENSORS,
        "",
        fused_modules,
        CompressedReader(strict=True),
        kernels_sglang.sglang_compressed,
        Demands(("config_groups",)),
        "sgl-project/sglang python/sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py",
    ),
    Engine(
        GPTQMODEL,
        "gptq",
        GPTQ,
        split_modules,
        GPTQReader(lists=False),
        kernels_gptqmodel.gptqmodel_gptq,
        Demands(("bits", "group_size"), (("checkpoint_format", ("gptq", "gptq_v2")),)),
        "ModelCloud/GPTQModel gptqmodel/models/loader.py",
    ),
    Engine(
        GPTQMODEL,
        "awq",
        AWQ,
        split_modules,
        read_awq_dynamic,
        kernels_gptqmodel.gptqmodel_awq,
        Demands((), (("bits", (4,)), ("version", ("gemm",)))),
        "ModelCloud/GPTQModel gptqmodel/models/loader.py",
    ),
)
"""Rows by engine, method and order. An engine without a row for a folder's method does not read it."""

NAMES = (VLLM, SGLANG, GPTQMODEL)
"""Engines of the table, in the order in which they are shown, behind Transformers."""
