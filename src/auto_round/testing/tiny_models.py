"""Tiny random language models of many families, saved to a folder: for tests that need a real checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

VOCABULARY = 128
_BASE: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_HYBRID = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    "num_hidden_layers": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": True}

DENSE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 8},
        "mistral": {"sliding_window": 8},
        "gemma2": {"head_dim": 8, "tie_word_embeddings": True, **_SLIDING},
        "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True, **_SLIDING},
        "phi3": {},
        "opt": _OPT,
        "gpt_neox": {},
        "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
        "cohere2": {"tie_word_embeddings": True, **_SLIDING},
        "olmo2": {},
        "glm4": {"head_dim": 8},
        "smollm3": {"no_rope_layers": [1, 0]},
        "starcoder2": {"tie_word_embeddings": True},
        "stablelm": {},
        "bloom": {"n_head": 4, "n_layer": 2},
    }
)
"""Families whose every matrix is one tensor on disk -> configuration besides the common sizes."""

EXPERTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mixtral": _LOCAL,
        "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
        "qwen3_moe": {**_EXPERTS, "head_dim": 8, "decoder_sparse_step": 1},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v2": {**_LATENT, "qk_nope_head_dim": 16},
        "deepseek_v3": _LATENT,
        "glm4_moe": _LATENT,
        "phimoe": _LOCAL,
        "minimax_m2": {**_LOCAL, "head_dim": 8, "rotary_dim": 4},
        "lfm2_moe": {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "nemotron_h": _HYBRID,
    }
)
"""Families with one matrix per expert on disk and fused ones in the module tree."""

KEPT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt2": {},
        "gpt_oss": {**_LOCAL, "head_dim": 8, **_SLIDING},
        "granitemoe": _LOCAL,
    }
)
"""Families with matrices that cannot be addressed one by one and stay at 16 bits."""

CARRYING: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"glm_moe_dsa": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}}
)
"""Families whose blocks hand on more than hidden states."""


def tiny_config(family: str, **changes: Any) -> Any:
    """Configuration of a family with two blocks (`nemotron_h`: four, of four kinds).

    Families that are not in the tables above may want more said than what all have.
    """
    from transformers import AutoConfig

    own = {**DENSE, **EXPERTS, **KEPT, **CARRYING}.get(family, {})
    return AutoConfig.for_model(family, **{**_BASE, **own, **changes})


def tiny_model(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights whose blocks all matter, in evaluation mode."""
    from auto_round.models.auto_classes import auto_class, auto_class_name

    model = auto_class(auto_class_name(config)).from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def save_tiny_model(
    family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a tiny model of a family, with its tokenizer, as `save_pretrained` does.

    Args:
        family: a key of `DENSE`, `EXPERTS`, `KEPT` or `CARRYING`.
        folder: is made if it is not there.
        seed: of the weights.
        dtype: of the weights.
        **changes: configuration values that differ from the table's.

    Returns:
        The folder.
    """
    tiny_model(tiny_config(family, **changes), seed=seed, dtype=dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A tokenizer of single bytes below 125, with padding 0, beginning 1 and end 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    words = {word: i for i, word in enumerate([*special, *map(chr, range(VOCABULARY - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        unk_token=special[2],
    )
