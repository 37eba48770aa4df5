"""The `quantization_config` of GPTQ folders, as GPTQModel, vLLM, SGLang and Transformers read it.

How the readers find the settings of a layer (sources: GPTQModel 7 `quantization/config.py`,
`models/loader.py`; vLLM `quantization/auto_gptq.py`, `utils/gptq_utils.py`; optimum, which Transformers
calls, `gptq/quantizer.py`):

* the fields at the top hold for every linear layer of the blocks, and for the head when `lm_head` is true;
* `dynamic` changes that: the first expression that matches from the start of a name (`re.match`) decides,
  `+:` with other fields, `-:` leaves the layer alone. GPTQModel, vLLM and SGLang know it, optimum does not;
* `modules_in_block_to_quantize` lists the layers that are quantized: optimum compares ends of names, vLLM
  looks for entries in names and, without a list, takes those of all packed tensors.

All of them read `config.json`; older ones only where there is no `quantize_config.json`, so none is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from auto_round.export.packed import top_scheme
from auto_round.export.reader_names import merged_names, module_names
from auto_round.facts.layer import Block, Layer, Role
from auto_round.schemes.condense import NameSet, condense
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.version import __version__

PROVENANCE: Mapping[str, Any] = {"provider": "auto-round", "autoround_version": __version__}
"""Who wrote a folder. vLLM's Qwen3-MoE asks the configuration about routers only when it sees the version."""

Says = tuple[tuple[str, Any], ...] | None
"""What `dynamic` says of a layer: fields that differ from the top; None to leave the layer alone."""


def gptq_config(
    checkpoint_format: str, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]
) -> dict[str, Any] | None:
    """Dictionary for `config.json` and `quantization_config.json`; None when nothing is quantized.

    Args:
        checkpoint_format: `gptq` (zero points stored minus one) or `gptq_v2`.
        plan: what becomes of each layer.
        layers: the layers of the plan.
        blocks: the blocks of the model.
    """
    if not plan.quantized:
        return None
    top = _fields(top_scheme(plan, layers, _fields))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        **top,
        "desc_act": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": any(layer.role is Role.HEAD and plan.scheme_of(layer.name) for layer in layers),
    }
    prefixes = {re.sub(r"\.\d+$", "", block.module) for block in blocks}
    if len(prefixes) == 1:
        config["block_name_to_quantize"] = prefixes.pop()
    listed = _listed(plan, layers)
    if listed:
        config["modules_in_block_to_quantize"] = [listed]
    dynamic = dynamic_rules({layer: _says(plan, layer, top) for layer in layers})
    if dynamic:
        config["dynamic"] = dynamic
    return {**config, **PROVENANCE}


def dynamic_rules(says: Mapping[Layer, Says]) -> dict[str, dict[str, Any]]:
    """`dynamic` of GPTQModel: exact expressions for every name under which a reader asks for a layer.

    Args:
        says: layer -> fields that differ, () for none, None to leave it alone.
    """
    of_names = {name: said for layer, said in says.items() for name in module_names(layer)}
    of_names |= {merged: of_names[part] for merged, part in merged_names(of_names).items()}
    alike: dict[Says, list[str]] = {}
    for name, said in of_names.items():
        if said != ():
            alike.setdefault(said, []).append(name)
    order = sorted(alike, key=lambda said: said is not None)  # GPTQModel asks the negative ones first
    return {
        f"{'-' if said is None else '+'}:{_expression(names)}": dict(said or ())
        for said in order
        for names in condense(alike[said])
    }


def _fields(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}


def _says(plan: Plan, layer: Layer, top: Mapping[str, Any]) -> Says:
    scheme = plan.scheme_of(layer.name)
    if scheme is None:
        return () if layer.role is Role.HEAD else None
    return tuple((key, value) for key, value in _fields(scheme).items() if top[key] != value)


def _listed(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """`modules_in_block_to_quantize`, full names: an end such as `mlp.up_proj` would name copied layers too.

    Empty where every layer of the blocks is quantized, and with quantized experts: optimum cannot load those,
    and vLLM finds the packed tensors by itself.
    """
    inside = [layer for layer in layers if layer.block is not None]
    written = [layer for layer in inside if plan.scheme_of(layer.name) is not None]
    if len(written) == len(inside) or any(layer.role is Role.EXPERT for layer in written):
        return []
    written += [layer for layer in layers if layer.role is Role.HEAD and plan.scheme_of(layer.name)]
    return [name for layer in written for name in module_names(layer)]


def _expression(names: NameSet) -> str:
    """Expression that matches exactly these names."""
    numbers = iter(names.numbers)
    parts = (_any_of(next(numbers)) if part is None else re.escape(part) for part in names.parts)
    path = r"\.".join(parts)
    return f"^{path}$"


def _any_of(numbers: Iterable[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"
