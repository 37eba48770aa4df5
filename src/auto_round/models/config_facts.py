"""What a configuration of Transformers says, read here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from auto_round.facts.model import ModelFacts
from auto_round.models.auto_classes import auto_class_name

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "top_k_experts")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length")
"""What families call the number of experts, those that a token passes through, and the context's length."""
_BLOCKS = ("num_hidden_layers", "n_layer")
_HEADS = ("num_attention_heads", "n_head")
_WIDTH = ("hidden_size", "n_embd")
_STATES = ("hc_mult", "altup_num_inputs")
"""What families with several hidden states of a token call their number: hyper-connections, AltUp."""
_IMAGE_TOKEN = ("image_token_id", "image_token_index")
_SHARED_CACHES = "num_kv_shared_layers"


def text_config(config: Any) -> Any:
    """Configuration of the part of a model that reads tokens."""
    return config.get_text_config()


def model_facts(config: Any) -> ModelFacts:
    """What a configuration says of its model."""
    text = text_config(config)
    lengths = (_number(text, name) for name in CONTEXT_NAMES)
    return ModelFacts(
        auto_class=auto_class_name(config),
        text=text,
        vocabulary=_number(text, "vocab_size"),
        width=_number(text, "hidden_size"),
        flowing=_number(text, "hidden_size") * (_first(text, *_STATES) or 1),
        heads=_number(text, "num_attention_heads"),
        context=next((length for length in lengths if length > 0), None),
        experts=expert_counts(config),
        chosen_experts=_first(text, *_CHOSEN),
        cached_by_token=_cached_by_token(text),
        image_token=max(-1, *(_number(config, name) or -1 for name in _IMAGE_TOKEN)),
    )


def expert_counts(config: Any) -> frozenset[int]:
    """Numbers of experts that a configuration mentions."""
    values: Mapping[str, Any] = text_config(config).to_dict()
    return frozenset(v for k in _EXPERTS if isinstance(v := values.get(k), int) and v > 1)


def shares_no_caches(config: Any) -> bool:
    """True where no block reads the key-value cache of another, in a family whose last blocks may."""
    return bool(text_config(config).to_dict().get(_SHARED_CACHES) == 0)


def _cached_by_token(text: Any) -> int:
    """Numbers that attention keeps of a token in all blocks: a key and a value for each head that has one."""
    blocks = _layers(text) or [text] * _first(text, *_BLOCKS)
    return 2 * sum(_kept_by_block(block) for block in blocks)


def _kept_by_block(config: Any) -> int:
    heads = _first(config, "num_key_value_heads", *_HEADS)
    return _number(config, "head_dim") * heads or _first(config, *_WIDTH)


def _layers(config: Any) -> list[Any]:
    """Configurations of all blocks where these differ (Transformers 5.24, as of Gemma 4); else nothing."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else []


def _first(config: Any, *names: str) -> int:
    """The first of these numbers that is there; 0 where none is."""
    return next((number for name in names if (number := _number(config, name)) > 0), 0)


def _number(config: Any, name: str) -> int:
    """A number, the largest of all blocks where these differ in it; 0 where there is none."""
    differs = name in (getattr(config, "per_layer_attributes", None) or ())
    values = (getattr(each, name, None) for each in (_layers(config) if differs else [config]))
    return max((value for value in values if isinstance(value, int)), default=0)
