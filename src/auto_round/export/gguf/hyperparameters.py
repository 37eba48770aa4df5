"""Numbers of a model's configuration as GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.gguf.families import Family
from auto_round.export.gguf.tensors import GgufTensor
from auto_round.export.gguf.values import Value

_SECTIONS = 4
_PLAIN_ROPE = ("default", "llama3")


def hyperparameters(family: Family, config: Any) -> dict[str, Value]:
    """Metadata that follows from the configuration, keys with the architecture before them.

    Args:
        family: row of the table.
        config: the text model's configuration.

    Raises:
        UnsupportedError: a setting that llama.cpp cannot compute.
    """
    found: dict[str, Value] = {}
    for key in family.keys:
        value = next((v for n in key.sources if (v := getattr(config, n, None)) is not None), key.default)
        if value is None and key.name.endswith(("key_length", "value_length", "dimension_count")):
            value = head_dim(config)
        if value is not None:
            found[key.name] = Value(key.kind, _cast(key.kind, value))
    found |= _rope(config)
    for name in family.computed:
        found |= COMPUTED[name](config)
    return {f"{family.arch}.{name}": value for name, value in found.items()}


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own) if own else int(config.hidden_size) // int(config.num_attention_heads)


def kv_heads(config: Any) -> int:
    """Key and value heads of a block."""
    if hasattr(config, "multi_query"):
        alike = config.multi_query and not config.new_decoder_architecture
        return 1 if alike else int(config.num_kv_heads)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def constants(config: Any) -> tuple[GgufTensor, ...]:
    """Tensors that are computed from the configuration: factors of the rotary frequencies.

    Raises:
        UnsupportedError: factors of the wrong length.
    """
    rope = _full(config)
    kind = rope.get("rope_type")
    if kind == "llama3":
        factors = tuple(_llama3_factors(rope, head_dim(config)))
        return (GgufTensor("rope_freqs.weight", (len(factors),), (), values=factors),)
    if kind not in {"longrope", "su"}:
        return ()
    wanted = rotary_width(config) // 2
    tensors = []
    for which in ("long", "short"):
        factors = tuple(float(f) for f in rope[f"{which}_factor"])
        if len(factors) != wanted:
            raise _refused(f"{which}_factor of rope_parameters has {len(factors)} numbers, expected {wanted}")
        tensors.append(GgufTensor(f"rope_factors_{which}.weight", (wanted,), (), values=factors))
    return tuple(tensors)


def rotary_width(config: Any) -> int:
    """Elements of a head that are rotated."""
    return int(float(_full(config).get("partial_rotary_factor", 1.0)) * head_dim(config))


def _refused(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "this configuration cannot be written as GGUF",
        [Refusal("gguf", reason, "pass a file made by llama.cpp's converter as --gguf_template")],
    )


def _cast(kind: str, value: Any) -> Any:
    return {"u32": int, "f32": float, "bool": bool, "str": str}[kind](value)


def _full(config: Any) -> Mapping[str, Any]:
    """Rotary settings of the layers with full attention."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention") or rope


def _rope(config: Any) -> dict[str, Value]:
    rope = _full(config)
    found: dict[str, Value] = {}
    if not rope:
        return found
    kind = rope.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        found["rope.scaling.type"] = Value("str", kind)
        found["rope.scaling.factor"] = Value("f32", float(rope["factor"]))
    elif kind in {"longrope", "su"}:
        found |= _long_rope(config, rope)
    elif kind not in _PLAIN_ROPE:
        raise _refused(f'rotary embeddings of type "{kind}" are not known to llama.cpp')
    if kind == "yarn":
        found |= _yarn(config, rope)
    found["rope.freq_base"] = Value("f32", float(rope["rope_theta"]))
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local:
        found["rope.freq_base_swa"] = Value("f32", float(local["rope_theta"]))
    return found


def _yarn(config: Any, rope: Mapping[str, Any]) -> dict[str, Value]:
    before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    found = {"rope.scaling.original_context_length": Value("u32", int(before))}
    for name, source in (
        ("ext_factor", "extrapolation_factor"),
        ("attn_factor", "attention_factor"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
    ):
        if rope.get(source) is not None:
            found[f"rope.scaling.yarn_{name}"] = Value("f32", float(rope[source]))
    return found


def _long_rope(config: Any, rope: Mapping[str, Any]) -> dict[str, Value]:
    """LongRoPE (arXiv 2402.13753): attention grows with the logarithm of the stretch."""
    before = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    stretch = config.max_position_embeddings / before
    factor = math.sqrt(1 + math.log(stretch) / math.log(before)) if stretch > 1 else 1.0
    return {
        "rope.scaling.type": Value("str", "longrope"),
        "rope.scaling.attn_factor": Value("f32", float(rope.get("attention_factor") or factor)),
        "rope.scaling.original_context_length": Value("u32", int(before)),
    }


def _llama3_factors(rope: Mapping[str, Any], width: int) -> list[float]:
    """Divisors of the rotary frequencies: 1 for short waves, `factor` for long ones, between in between.

    Source: `_compute_llama3_parameters` of Transformers, as Llama 3.1 defines it.
    """
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    before = float(rope["original_max_position_embeddings"])
    found = []
    for i in range(0, width, 2):
        wave = 2 * math.pi * float(rope["rope_theta"]) ** (i / width)
        smooth = min(1.0, max(0.0, (before / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _windows(config: Any, every: int) -> dict[str, Value]:
    """Which blocks look at a window only; written where it is not all but every n-th, llama.cpp's default."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {}
    local = tuple(kind == "sliding_attention" for kind in kinds)
    if local == tuple((i + 1) % every != 0 for i in range(len(local))):
        return {}
    return {"attention.sliding_window_pattern": Value("bool[]", local)}


def _gemma_scale(config: Any) -> dict[str, Value]:
    """llama.cpp scales queries by the head's width, in the 27B models by width / heads."""
    big = int(config.num_hidden_layers) in {46, 62}
    wanted = config.hidden_size // config.num_attention_heads if big else head_dim(config)
    if int(config.query_pre_attn_scalar) != wanted:
        raise _refused(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, llama.cpp takes {wanted}")
    return {}


def _no_rotation(config: Any, every: int) -> dict[str, Value]:
    """llama.cpp leaves the rotation out in every n-th block, always."""
    rotates = [bool(r) for r in getattr(config, "no_rope_layers", None) or ()]
    if rotates != [(i + 1) % every != 0 for i in range(len(rotates))]:
        raise _refused(f"no_rope_layers must leave out every {every}th block, as llama.cpp does")
    return {}


def _sections(config: Any) -> dict[str, Value]:
    """Rotary pairs that turn by time, height, width, and a fourth that no model of these families has."""
    sections = [int(n) for n in _full(config).get("mrope_section", ())]
    if not 1 <= len(sections) <= _SECTIONS:
        raise _refused(f"mrope_section of rope_parameters is {sections}, expected 1 to {_SECTIONS} numbers")
    padded = (*sections, *[0] * (_SECTIONS - len(sections)))
    return {"rope.dimension_sections": Value("i32[]", padded)}


def _falcon(config: Any) -> dict[str, Value]:
    return {
        "attention.head_count_kv": Value("u32", kv_heads(config)),
        "tensor_data_layout": Value("str", "jploski"),
    }


def _four_times(config: Any) -> dict[str, Value]:
    own = getattr(config, "n_inner", None) or getattr(config, "ffn_hidden_size", None)
    return {"feed_forward_length": Value("u32", int(own or 4 * config.hidden_size))}


COMPUTED: Mapping[str, Callable[[Any], dict[str, Value]]] = {
    "windows every 2": lambda config: _windows(config, 2),
    "windows every 6": lambda config: _windows(config, 6),
    "gemma scale": _gemma_scale,
    "no rotation every 4": lambda config: _no_rotation(config, 4),
    "partial rotary": lambda config: {"rope.dimension_count": Value("u32", rotary_width(config))},
    "whole rotary": lambda config: {"rope.dimension_count": Value("u32", head_dim(config))},
    "four times as wide": _four_times,
    "falcon": _falcon,
    "rotary sections": _sections,
}
"""Keys that need arithmetic, or a check, by the names that families use."""
