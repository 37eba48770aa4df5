"""Layers of a correct compressed-tensors folder that Transformers cannot load.

Transformers converts some tensors while it loads them: it stacks experts, puts convolutions side by side,
splits matrices. It unpacks such tensors first, all with the settings of one config group, and loses those
that are not packed. It also replaces some modules by others whose tensors have other names.

Source: Transformers 5.24 `integrations/compressed_tensors.py`, `quantizers/base.py`; 5.17 does so with
experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from auto_round.errors import Refusal
from auto_round.export.compressed_config import compressed_layout, group_of
from auto_round.facts.compressed import COMPRESSED_TENSORS, FP8, MXFP4, MXFP6, WORDS
from auto_round.facts.layer import Layer
from auto_round.facts.loading import Loading
from auto_round.schemes.condense import some
from auto_round.schemes.plan import Plan

_ELSE = "use the format auto_round"
EXPERTS_READ = (WORDS, MXFP4, MXFP6)
EXPERTS_BY_ROW = (FP8,)
"""Orders of bytes of experts that Transformers unpacks, and those that it unpacks with one scale for each
row or matrix. It leaves out what NVFP4 is divided by, and knows no bytes of whole numbers.

Source: `CompressedTensorsDequantize.convert` in `integrations/compressed_tensors.py` of Transformers 5.24."""


def unloadable(who: str, plan: Plan, layers: Sequence[Layer], loading: Loading) -> list[Refusal]:
    """Why Transformers would not load the folder of a plan, or not as it is meant.

    Args:
        who: name of the output format.
        plan: what becomes of each layer; something is quantized.
        layers: the layers of the plan.
        loading: how Transformers loads the model.
    """
    rebuilt = loading.rebuilt.get(COMPRESSED_TENSORS, ())
    single = [plan.scheme_of(layer.name) for layer in layers if layer.rebuilt]
    if rebuilt and not (single and all(single)):
        reason = "Transformers puts other modules in their place, whose tensors have other names"
        return [Refusal(who, f"{reason}: {_layers(rebuilt)}", f"quantize them too, or {_ELSE}")]
    schemes = {layer.tensor: plan.scheme_of(layer.name) for layer in layers}
    found = []
    dropped = [t for tensors in loading.converted for t in tensors if schemes.get(t) is None]
    if dropped:
        reason = "Transformers converts these while it loads them, which it does with packed ones only"
        remedy = f"quantize them too, or {_ELSE}" if all(t in schemes for t in dropped) else _ELSE
        found.append(Refusal(who, f"{reason}: {_layers(dropped)}", remedy))
    converted = {s for tensors in loading.converted for t in tensors if (s := schemes.get(t)) is not None}
    if len({group_of(scheme) for scheme in converted}) > 1:
        reason = "Transformers unpacks all matrices that it converts, as those of experts, by one scheme"
        found.append(Refusal(who, reason, f"give them one, or {_ELSE}"))
    return found


def unread_experts(plan: Plan, layers: Sequence[Layer]) -> str:
    """What Transformers makes of experts that others read, for people; empty where it reads them too."""
    written = [layer for layer in layers if layer.fused and plan.scheme_of(layer.name) is not None]
    if not all(layer.rebuilt for layer in written):
        return f"Transformers looks for one tensor of all experts here, unlike vLLM; {_ELSE} for it"
    for layer in layers:
        scheme, fmt = plan.scheme_of(layer.name), plan.format_of(layer.name)
        if layer.expert is not None and scheme is not None and fmt is not None:
            order = compressed_layout(scheme).name
            if order not in EXPERTS_READ and (order not in EXPERTS_BY_ROW or fmt.group.size > 0):
                return f"Transformers 5.24 misreads experts in {order}, unlike vLLM; {_ELSE} for it"
    return ""


def _layers(tensors: Sequence[str]) -> str:
    return some(sorted({name.removesuffix(".weight") for name in tensors}))
