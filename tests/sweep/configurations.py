"""Tiny configurations of every causal family of Transformers: shared sizes, and what each needs besides.

Families that the installed Transformers does not know, or knows otherwise, are left out by `known_families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Sizes = Mapping[str, Any]

SIZES: Sizes = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: Sizes = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 64),
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
}
"""Under all names that families have for them; each takes those that it knows."""
LATENT: Sizes = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": None,
}
INDEXED: Sizes = {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
GPT: Sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "n_positions": 128, "n_ctx": 128}
SLIDING: Sizes = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
RECURRENT: Sizes = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA: Sizes = {
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_d_conv", "conv_kernel"), 4),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    "use_mamba_kernels": False,
}
CONVOLVING: Sizes = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96}
PER_LAYER: Sizes = {
    **SLIDING,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 16,
    "global_head_dim": 16,
}
SHARING: Sizes = {
    **PER_LAYER,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
"""The last blocks read keys and values of earlier ones, as in the small models of Gemma 3n and 4."""
RELATIVE: Sizes = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "sliding_window": 8,
    "d_rel": 8,
    "rel_extent": 32,
    "unpadded_vocab_size": 128,
}

_PLAIN = """
apertus apertus1p5_text arcee aria_text biogpt bitnet cohere cohere2_moe cwm diffllama doge dots1 ernie4_5
exaone exaone_moe flex_olmo flint gemma glm glm4 glm4_moe gpt_neox gpt_neox_japanese granite granite_swa
granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
inkling_text internlm3 iquestcoder jais2 kolibri1 laguna lara_mini llama mellum minimax_m3_vl_text ministral
ministral3 mistral mixtral nemotron nanochat olmo olmo2 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe sarvam_moe seed_oss solar_open stablelm starcoder2
"""

FAMILIES: Mapping[str, Sizes] = {
    **{family: {} for family in _PLAIN.split()},
    **dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "mimo_v2_flash"), SLIDING),
    **dict.fromkeys(("olmo3", "vaultgemma"), SLIDING),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"), LATENT),
    **dict.fromkeys(("sarvam_mla", "youtu"), LATENT),
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": {**INDEXED, "num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), RECURRENT),
    **dict.fromkeys(("mamba", "falcon_mamba"), MAMBA),
    **dict.fromkeys(("lfm2", "lfm3"), CONVOLVING),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "openai-gpt"), GPT),
    "gptj": {**GPT, "rotary_dim": 8},
    "codegen": {**GPT, "rotary_dim": 8},
    "gemma4_text": SHARING,
    "gemma4_unified_text": PER_LAYER,
    **dict.fromkeys(("inkling2_text", "inkling2_loop_text"), RELATIVE),
    "afmoe": {"num_dense_layers": 1, **SLIDING},
    "axk2": {**INDEXED, "head_dim": 16, "gated_norm_rank": 8},
    "bailing_hybrid": {**LATENT, **RECURRENT},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "bloom": {"n_head": 4, "n_layer": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3],
        "patching_mode": "entropy",
        **{
            f"{part}_config": {
                "vocab_size": 260,
                "hidden_size": 64,
                "hidden_size_global": 64,
                "intermediate_size": 96,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "num_hidden_layers": 2,
                "max_position_embeddings": 128,
            }
            for part in ("encoder", "decoder", "global", "patcher")
        },
        "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4},
    "ctrl": {"dff": 128, **GPT},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": {**INDEXED, "layer_types": ["indexed_attention"] * 2},
    "deepseek_v4": {**LATENT, "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dory": {"num_hidden_layers": 2},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "gemma3n_text": {
        **SHARING,
        "activation_sparsity_pattern": [0.5, 0.0] * 2,
        "intermediate_size": [96] * 4,
    },
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **MAMBA},
    "hy_v4": {
        **INDEXED,
        "head_dim": 16,
        "hc_mult": 2,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "shared", "full"],
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        **MAMBA,
    },
    "jetmoe": {"kv_channels": 16},
    "kimi_linear": {
        **LATENT,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"num_dense_layers": 1, **CONVOLVING},
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "moe_layers": [1],
        "attention_chunk_size": 32,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 2,
    },
    "longcat_flash": {**LATENT, "num_layers": 2, "zero_expert_num": 2, "ffn_hidden_size": 96, "head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, **MAMBA},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "minimax_m2": {"rotary_dim": 8},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 96,
        **MAMBA,
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "qwen4_exp_text": {"num_hidden_layers": 2},
    "recurrent_gemma": {
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 8,
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 128},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xglm": {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    "xlstm": {"embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "chunk_size": 8},
    "zamba": {
        "n_mamba_heads": 2,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        **MAMBA,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
        **MAMBA,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""Family -> what differs from the common sizes."""

LARGEST = 8_000_000
"""Parameters of a model that counts as tiny."""


def known_families() -> list[str]:
    """Families of the table that the installed Transformers has, by name."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

    return sorted(family for family in FAMILIES if family in MODELS and family in CONFIG_MAPPING)


def family_config(family: str) -> Any:
    """The tiny configuration of a family.

    Raises:
        ValueError: the installed Transformers wants other fields.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    cls = CONFIG_MAPPING[family]
    default = cls()
    known = set(default.to_dict()) | set(dir(default)) | set(getattr(cls, "attribute_map", {}))
    own = FAMILIES[family]
    shared = {k: v for k, v in {**SIZES, **EXPERTS}.items() if k in known}
    values = {k: v for k, v in {**shared, **_kinds(default, own), **own}.items() if k in known}
    if values.get("head_dim", 0) is None:
        del values["head_dim"]
    return AutoConfig.for_model(family, **values)


def _kinds(default: Any, own: Sizes) -> dict[str, Any]:
    """Kinds of layers, each once, where a family has a list of them and the table says nothing."""
    kinds = default.to_dict().get("layer_types")
    if not isinstance(kinds, list) or {"layer_types", "layers_block_type", "num_hidden_layers"} & own.keys():
        return {}
    different = list(dict.fromkeys(kinds))[:3]
    chosen = (different * 2)[: max(2, len(different))]
    found: dict[str, Any] = {"layer_types": chosen, "num_hidden_layers": len(chosen)}
    if "mlp_layer_types" in default.to_dict():
        found["mlp_layer_types"] = ["dense", *["sparse"] * (len(chosen) - 1)]
    return found
