"""The `quantization_config` of AWQ folders, as vLLM, SGLang, Transformers, GPTQModel and AutoAWQ read it.

One width and one group size hold for all layers, except those that `modules_to_not_convert` names. Readers
match an entry of that list in different ways:

* vLLM, SGLang and AutoAWQ look for it anywhere in a name; of a merged matrix SGLang takes the matrix's own
  name, vLLM those of its parts;
* Transformers takes it as an expression that matches the beginning of the name, or as the name's end;
* GPTQModel ignores the list and goes by `dynamic`.

Entries are chosen so that all agree, and both lists are written.

`zero_point` is true for symmetric weights too: their zero points are stored like any others (all are 8).
Without it vLLM would take its slow kernels, which know float16 only, instead of Marlin.

Source: vLLM `quantization/auto_awq.py` (`is_layer_skipped`, `check_marlin_supported`); Transformers 5
`quantizers_utils.should_convert_module`; AutoAWQ 0.2 `utils/module.py`; GPTQModel 7 `models/loader.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from auto_round.export.gptq_config import PROVENANCE, dynamic_rules
from auto_round.export.packed import top_scheme
from auto_round.export.reader_names import merged_names, module_names
from auto_round.facts.layer import Block, Layer, Role
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme


def awq_config(plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]) -> dict[str, Any] | None:
    """Dictionary for `config.json` and `quantization_config.json`; None when nothing is quantized.

    Args:
        plan: what becomes of each layer; all quantized ones have one group size.
        layers: the layers of the plan.
        blocks: the blocks of the model.
    """
    if not plan.quantized:
        return None
    config: dict[str, Any] = {
        "quant_method": "awq",
        **_fields(top_scheme(plan, layers, _fields)),
        "zero_point": True,
        "version": "gemm",
    }
    skipped = not_converted(plan, layers, blocks)
    if skipped:
        config["modules_to_not_convert"] = skipped
    asked = [layer for layer in layers if layer.role is not Role.HEAD]  # readers skip the head anyway
    dynamic = dynamic_rules({layer: () if plan.scheme_of(layer.name) else None for layer in asked})
    if dynamic:
        config["dynamic"] = dynamic
    return {**config, **PROVENANCE}


def not_converted(plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]) -> list[str]:
    """`modules_to_not_convert`: kept layers, by short names that no quantized layer's name contains."""
    says = {layer.name: plan.scheme_of(layer.name) is None for layer in layers}
    merged = merged_names(says)
    written = [name for layer in layers if not says[layer.name] for name in module_names(layer)]
    written += [name for name, part in merged.items() if not says[part]]
    text = "\n".join(written)
    places = {block.index: (f"{block.disk}.", f"{block.module}.") for block in blocks}
    inside = {layer.name: places.get(layer.block, ()) for layer in layers if layer.block is not None}
    entries: dict[str, None] = {}
    for layer in layers:
        if says[layer.name]:
            names = [*module_names(layer), *(name for name, part in merged.items() if part == layer.name)]
            for name in names:
                entries[_shortest(name, inside.get(layer.name, ()), text)] = None
    return list(entries)


def clashes(plan: Plan, layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """Pairs of a kept and a quantized layer whose name contains the kept one's: vLLM would skip both."""
    written = [layer.name for layer in layers if plan.scheme_of(layer.name)]
    text = "\n".join(written)
    found = [entry for entry in not_converted(plan, layers, ()) if entry in text]
    return [(entry, name) for entry in found for name in written if entry in name]


def _shortest(name: str, places: Sequence[str], written: str) -> str:
    """The name without the block's, where no name in `written` (one a line) contains it."""
    for place in places:
        short = name.removeprefix(place)
        if short != name and short not in written:
            return short
    return name


def _fields(scheme: QuantizationScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size}
