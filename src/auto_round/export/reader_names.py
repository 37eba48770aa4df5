"""Under which names the readers of GPTQ and AWQ folders ask for a layer.

Transformers and GPTQModel ask for modules of the model's tree. vLLM and SGLang ask for the matrices that they
compute with: q, k and v in one, gate and up in one, all routed experts of a block in one. What a
configuration says of a layer has to hold under each of these names.
"""

from __future__ import annotations

from collections.abc import Mapping

from auto_round.facts.layer import Layer
from auto_round.schemes.siblings import fused_groups

MERGED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
"""Last component of a merged matrix and of its parts. Source: `packed_modules_mapping` in vLLM's models."""

EXPERTS = ("experts", "experts.routed_experts")
"""Last components of the module that holds all routed experts of a block; the second in newer vLLM."""


def module_names(layer: Layer) -> tuple[str, ...]:
    """Name on disk, and the path of the layer's module where that differs."""
    path = layer.parameter.removesuffix(".weight")
    if layer.expert is not None or layer.rows is not None or path == layer.parameter:
        return (layer.name,)
    return tuple(dict.fromkeys((layer.name, path)))


def merged_names(says: Mapping[str, object]) -> dict[str, str]:
    """Merged matrix -> one of its parts; only those for whose parts the configuration says the same.

    Args:
        says: name of every layer -> what the configuration says of it; compared by equality.
    """
    groups: dict[str, list[str]] = {}
    inside: set[str] = set()
    for container, members in fused_groups(says).items():
        parent, _, last = container.rpartition(".")
        if last == EXPERTS[0]:
            inside.update(members)
            groups |= {f"{parent}.{module}": members for module in EXPERTS}
    for name in says:
        parent, _, last = name.rpartition(".")
        for merged, parts in MERGED:
            if last == parts[0] and name not in inside:
                groups[f"{parent}.{merged}"] = [f"{parent}.{part}" for part in parts]
    return {
        merged: members[0]
        for merged, members in groups.items()
        if merged not in says and all(part in says and says[part] == says[members[0]] for part in members)
    }
