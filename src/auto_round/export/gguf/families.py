"""Families of models that are written as GGUF without a template: one row each.

Source: the conversion classes of llama.cpp (conversion/*.py) and what src/models/*.cpp reads. The names of
tensors are not here: they come from the `gguf` package's own map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from auto_round.errors import Refusal, UnsupportedError


@dataclass(frozen=True, slots=True)
class Key:
    """One number of the configuration in the file.

    Attributes:
        name: key without the architecture before it.
        sources: attributes of the configuration, the first that is set counts.
        kind: type in the file: "u32", "f32", "bool".
        default: value when none is set; None leaves the key out.
    """

    name: str
    sources: tuple[str, ...]
    kind: str = "u32"
    default: Any = None


_COUNTS = (
    Key("block_count", ("num_hidden_layers",)),
    Key("context_length", ("max_position_embeddings",)),
    Key("embedding_length", ("hidden_size",)),
    Key("feed_forward_length", ("intermediate_size", "n_inner")),
    Key("attention.head_count", ("num_attention_heads",)),
    Key("attention.head_count_kv", ("num_key_value_heads",)),
)
_HEAD_DIM = (Key("attention.key_length", ("head_dim",)), Key("attention.value_length", ("head_dim",)))
_RMS = (Key("attention.layer_norm_rms_epsilon", ("rms_norm_eps",), "f32"),)
_ROTARY = (Key("rope.dimension_count", ("head_dim",)), Key("vocab_size", ("vocab_size",)))
_EXPERTS = (
    Key("expert_count", ("num_local_experts", "num_experts")),
    Key("expert_used_count", ("num_experts_per_tok",)),
)
_SMALL_EXPERTS = (*_EXPERTS, Key("expert_feed_forward_length", ("moe_intermediate_size",)))
_STACK_EXPERTS = ((r"\.experts\.(?P<i>\d+)\.", ".experts."),)
_WINDOW = (Key("attention.sliding_window", ("sliding_window",)),)
_QUERY_KEY = (("q_proj", "q"), ("k_proj", "kv"))


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of models is described to llama.cpp.

    Attributes:
        arch: `general.architecture`.
        keys: numbers of the configuration.
        rotated: last component of a matrix's module -> "q" or "kv": its rows are reordered for llama.cpp's
            rotary pairs, by that number of heads.
        stacked: patterns whose group `i` numbers tensors that become one, and what the match turns into.
        renamed: pattern -> text, for names that the map of the `gguf` package spells otherwise.
        plus_one: norms multiply by one plus their weight.
        transposed: modules that store `[in, out]`.
        demands: attribute -> values that llama.cpp takes for granted; anything else is refused.
        deepstack: images are added to the states of the first blocks; the file says of how many.
        computed: names in `hyperparameters.COMPUTED` of keys that need arithmetic.
    """

    arch: str
    keys: tuple[Key, ...]
    rotated: tuple[tuple[str, str], ...] = ()
    stacked: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    plus_one: bool = False
    transposed: tuple[str, ...] = ()
    demands: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    deepstack: bool = False
    computed: tuple[str, ...] = ()


_LLAMA = Family("llama", (*_COUNTS, *_HEAD_DIM, *_RMS, *_ROTARY), rotated=_QUERY_KEY)
_QWEN2_VL = Family(
    "qwen2vl", (*_COUNTS, *_RMS), demands={"use_sliding_window": (False,)}, computed=("rotary sections",)
)
_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "mixtral": Family(
            "llama",
            (*_COUNTS, *_HEAD_DIM, *_RMS, *_ROTARY, *_EXPERTS),
            rotated=_QUERY_KEY,
            stacked=_STACK_EXPERTS,
            renamed=((r"^model\.(layers\.\d+)\.block_sparse_moe\.experts\.", r"\1.feed_forward.experts."),),
        ),
        "qwen2": Family("qwen2", (*_COUNTS, *_RMS), demands={"use_sliding_window": (False,)}),
        "qwen2_vl_text": _QWEN2_VL,
        "qwen2_5_vl_text": _QWEN2_VL,
        "qwen3_vl_text": Family(
            "qwen3vl", (*_COUNTS, *_HEAD_DIM, *_RMS), deepstack=True, computed=("rotary sections",)
        ),
        "qwen2_moe": Family(
            "qwen2moe",
            (
                *_COUNTS,
                *_RMS,
                *_SMALL_EXPERTS,
                Key("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
            ),
            stacked=_STACK_EXPERTS,
            demands={
                "use_sliding_window": (False,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
                "norm_topk_prob": (False,),
            },
        ),
        "qwen3": Family("qwen3", (*_COUNTS, *_HEAD_DIM, *_RMS), demands={"use_sliding_window": (False,)}),
        "qwen3_moe": Family(
            "qwen3moe",
            (*_COUNTS, *_HEAD_DIM, *_RMS, *_SMALL_EXPERTS),
            stacked=_STACK_EXPERTS,
            demands={
                "use_sliding_window": (False,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
                "norm_topk_prob": (True,),
            },
        ),
        "gemma2": Family(
            "gemma2",
            (
                *_COUNTS,
                *_HEAD_DIM,
                *_RMS,
                *_WINDOW,
                Key("attn_logit_softcapping", ("attn_logit_softcapping",), "f32"),
                Key("final_logit_softcapping", ("final_logit_softcapping",), "f32"),
            ),
            plus_one=True,
            computed=("windows every 2", "gemma scale"),
        ),
        "gemma3_text": Family(
            "gemma3",
            (
                *_COUNTS,
                *_HEAD_DIM,
                *_RMS,
                *_WINDOW,
                Key("final_logit_softcapping", ("final_logit_softcapping",), "f32"),
            ),
            plus_one=True,
            demands={"attn_logit_softcapping": (None,)},
            computed=("windows every 6", "gemma scale"),
        ),
        "phi3": Family(
            "phi3",
            (
                *_COUNTS,
                *_RMS,
                Key("rope.scaling.original_context_length", ("original_max_position_embeddings",)),
                Key("attention.sliding_window", ("sliding_window",), default=0),
            ),
            computed=("partial rotary",),
        ),
        "gpt2": Family(
            "gpt2",
            (*_COUNTS[:3], _COUNTS[4], Key("attention.layer_norm_epsilon", ("layer_norm_epsilon",), "f32")),
            transposed=("c_attn", "c_proj", "c_fc"),
            demands={"scale_attn_by_inverse_layer_idx": (False,)},
            computed=("four times as wide",),
        ),
        "stablelm": Family(
            "stablelm",
            (
                *_COUNTS,
                Key("attention.layer_norm_epsilon", ("layer_norm_eps",), "f32"),
                Key("use_parallel_residual", ("use_parallel_residual",), "bool", True),
            ),
            stacked=((r"_layernorm\.norms\.(?P<i>\d+)\.", "_layernorm."),),
            computed=("partial rotary",),
        ),
        "falcon": Family(
            "falcon",
            (
                Key("block_count", ("num_hidden_layers",)),
                Key("context_length", ("max_position_embeddings",), default=2048),
                Key("embedding_length", ("hidden_size",)),
                Key("attention.head_count", ("num_attention_heads",)),
                Key("attention.layer_norm_epsilon", ("layer_norm_epsilon",), "f32"),
            ),
            rotated=(("query_key_value", "groups"),),
            demands={"alibi": (False,), "parallel_attn": (True,), "bias": (False,)},
            computed=("four times as wide", "falcon"),
        ),
        "olmo": Family(
            "olmo",
            (
                *_COUNTS,
                Key("attention.layer_norm_epsilon", ("layer_norm_eps",), "f32", 1e-5),
                Key("attention.clamp_kqv", ("clip_qkv",), "f32"),
            ),
            rotated=_QUERY_KEY,
        ),
        "olmo2": Family("olmo2", (*_COUNTS, *_RMS)),
        "granite": Family(
            "granite",
            (
                *_COUNTS,
                *_RMS,
                Key("vocab_size", ("vocab_size",)),
                Key("attention.scale", ("attention_multiplier",), "f32"),
                Key("embedding_scale", ("embedding_multiplier",), "f32"),
                Key("residual_scale", ("residual_multiplier",), "f32"),
                Key("logit_scale", ("logits_scaling",), "f32"),
            ),
            rotated=_QUERY_KEY,
            computed=("whole rotary",),
        ),
        "smollm3": Family(
            "smollm3",
            (*_COUNTS, *_HEAD_DIM, *_RMS, *_ROTARY),
            rotated=_QUERY_KEY,
            demands={"use_sliding_window": (False,)},
            computed=("no rotation every 4",),
        ),
    }
)
"""Families by Transformers' `model_type`."""


def family_of(config: Any) -> Family:
    """Family of a text configuration.

    Raises:
        UnsupportedError: no row for it, or a setting that llama.cpp does not have.
    """
    kind = str(config.model_type)
    if kind not in FAMILIES:
        raise UnsupportedError(
            f'no GGUF description of model type "{kind}"; known: {", ".join(FAMILIES)}',
            [
                Refusal(
                    "gguf",
                    "metadata and tensor names of this architecture are not in the table",
                    "make a file with llama.cpp's convert_hf_to_gguf.py --outtype f16 and pass it as "
                    "--gguf_template model-f16.gguf, or choose another format",
                )
            ],
        )
    family = FAMILIES[kind]
    for name, allowed in family.demands.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise UnsupportedError(
                f'model type "{kind}" with {name} = {value!r} cannot be written as GGUF',
                [Refusal("gguf", f"llama.cpp computes {family.arch} with {name} = {allowed[0]!r} always")],
            )
    return family
