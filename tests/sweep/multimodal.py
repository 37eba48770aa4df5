"""Tiny configurations of families that read images or sound beside text, and an image for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sweep import configurations
from sweep.configurations import RECURRENT

Sizes = Mapping[str, Any]

IMAGE = 100
"""Token that stands for a piece of an image."""
TEXT: Sizes = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: Sizes = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
PACKED: Sizes = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "in_channels": 3,
}
"""Vision towers of the Qwen and GLM families, whose patches of all images lie in one tensor."""
EXPERTS: Sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROTARY: Sizes = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
}
PARTLY_ROTARY: Sizes = {
    **ROTARY,
    "rope_parameters": {**ROTARY["rope_parameters"], "partial_rotary_factor": 1.0},
}
SLIDING: Sizes = {"head_dim": 16, **configurations.SLIDING}
TOKENS: Sizes = {
    "image_token_id": IMAGE,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}
SOUND: Sizes = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "output_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "n_window": 10,
}
LATENT: Sizes = {
    **{name: size for name, size in configurations.LATENT.items() if name != "head_dim"},
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}

Inputs = dict[str, Tensor]
Random = Callable[..., Tensor]
"""Random numbers of a shape, from a generator of the test's."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family that reads more than text.

    Attributes:
        model_type: its name in Transformers.
        config: what its tiny configuration says.
        image: inputs beside tokens for one image, from random numbers and the tokens `[1, length]`.
        pieces: tokens that stand for the image.
        start: tokens before them.
    """

    model_type: str
    config: Sizes
    image: Callable[[Random, Tensor], Inputs] | None = None
    pieces: int = 4
    start: tuple[int, ...] = field(default=())


def _text(kind: str, **more: Any) -> Sizes:
    return {**TEXT, "model_type": kind, **more}


def _tower(kind: str, **more: Any) -> Sizes:
    return {**TOWER, "model_type": kind, **more}


def _plain(side: int) -> Callable[[Random, Tensor], Inputs]:
    return lambda random, ids: {"pixel_values": random(1, 3, side, side)}


def _sized(side: int) -> Callable[[Random, Tensor], Inputs]:
    return lambda random, ids: {
        "pixel_values": random(1, 3, side, side),
        "image_sizes": torch.tensor([[side, side]]),
    }


def _tiles(random: Random, ids: Tensor) -> Inputs:
    return {"pixel_values": random(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}


def _typed(name: str, side: int) -> Callable[[Random, Tensor], Inputs]:
    return lambda random, ids: {
        "pixel_values": random(1, 3, side, side),
        name: (ids == IMAGE).to(torch.int64),
    }


def _patches(random: Random) -> Inputs:
    return {"pixel_values": random(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _packed(random: Random, ids: Tensor) -> Inputs:
    return {**_patches(random), "mm_token_type_ids": (ids == IMAGE).to(torch.int32)}


def _masked(random: Random, ids: Tensor) -> Inputs:
    return {**_patches(random), "attention_mask": torch.ones_like(ids)}


def _crossed(random: Random, ids: Tensor) -> Inputs:
    return {
        "pixel_values": random(1, 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": torch.ones(1, ids.shape[1], 1, 4, dtype=torch.int64),
    }


def _gemma4(random: Random, ids: Tensor) -> Inputs:
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
    return {
        "pixel_values": random(1, 16, 48),
        "image_position_ids": place.reshape(1, 16, 2),
        "mm_token_type_ids": (ids == IMAGE).to(torch.int64),
    }


FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        "llava",
        {
            "text_config": _text("llama"),
            "vision_config": _tower("clip_vision_model", projection_dim=64),
            "image_token_index": IMAGE,
        },
        _plain(28),
    ),
    "llava_siglip": Family(
        "llava",
        {
            "text_config": _text("llama"),
            "vision_config": _tower("siglip_vision_model"),
            "image_token_index": IMAGE,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -2,
        },
        _plain(28),
    ),
    "llava_pixtral": Family(
        "llava",
        {
            "text_config": _text("mistral", head_dim=16),
            "vision_config": _tower("pixtral", image_size=56, head_dim=16),
            "image_token_index": IMAGE,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
        _sized(56),
        16,
    ),
    "llava_next": Family(
        "llava_next",
        {
            "text_config": _text("granite"),
            "vision_config": _tower("siglip_vision_model"),
            "image_token_index": IMAGE,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": [-2, -1],
            "image_grid_pinpoints": [[28, 28]],
        },
        _tiles,
        10,
    ),
    "llava_onevision": Family(
        "llava_onevision",
        {
            "text_config": _text("qwen2"),
            "vision_config": _tower("siglip_vision_model"),
            "image_token_index": IMAGE,
            "video_token_index": 101,
            "image_grid_pinpoints": [[28, 28]],
        },
        _tiles,
        10,
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": _text("mistral", head_dim=16),
            "vision_config": _tower("pixtral", image_size=56, head_dim=16),
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        _sized(56),
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": _text("gemma3_text", **SLIDING),
            "vision_config": _tower("siglip_vision_model"),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": 104,
            "eoi_token_index": 105,
        },
        _typed("token_type_ids", 28),
    ),
    "gemma4": Family(
        "gemma4",
        {
            "text_config": _text(
                "gemma4_text",
                num_hidden_layers=3,
                layer_types=["sliding_attention", "full_attention", "full_attention"],
                sliding_window=8,
                global_head_dim=16,
                hidden_size_per_layer_input=32,
                vocab_size_per_layer_input=128,
                num_kv_shared_layers=1,
            ),
            "vision_config": _tower(
                "gemma4_vision", head_dim=16, num_key_value_heads=4, patch_size=4, pooling_kernel_size=2
            ),
            "audio_config": None,
            "image_token_id": IMAGE,
            "boi_token_id": 104,
            "eoi_token_id": 105,
        },
        _gemma4,
    ),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": _text("gemma", head_dim=16),
            "vision_config": _tower("siglip_vision_model", vision_use_head=False),
            "image_token_index": IMAGE,
            "projection_dim": 64,
            "hidden_size": 64,
        },
        lambda random, ids: {"pixel_values": random(1, 3, 28, 28), "token_type_ids": torch.zeros_like(ids)},
    ),
    "idefics3": Family(
        "idefics3",
        {
            "text_config": _text("llama"),
            "vision_config": _tower("idefics3_vision", image_size=56),
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        lambda random, ids: {"pixel_values": random(1, 1, 3, 56, 56)},
    ),
    "smolvlm": Family(
        "smolvlm",
        {
            "text_config": _text("llama"),
            "vision_config": _tower("smolvlm_vision", image_size=56),
            "scale_factor": 2,
            "image_token_id": IMAGE,
        },
        lambda random, ids: {"pixel_values": random(1, 1, 3, 56, 56)},
    ),
    "mllama": Family(
        "mllama",
        {
            "text_config": _text(
                "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1], rope_theta=10000.0
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 192,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            "image_token_index": 127,
        },
        _crossed,
        0,
        (127,),
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        {
            "text_config": {**TEXT, **ROTARY},
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {
            "text_config": {**TEXT, **ROTARY},
            "vision_config": {**PACKED, "fullatt_block_indexes": [1], "window_size": 28},
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {
            "text_config": {**TEXT, **ROTARY, "num_hidden_layers": 3},
            "vision_config": {**PACKED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {
            "text_config": {**TEXT, **ROTARY, **EXPERTS, "num_hidden_layers": 3, "decoder_sparse_step": 1},
            "vision_config": {**PACKED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "qwen3_5": Family(
        "qwen3_5",
        {
            "text_config": {**TEXT, **PARTLY_ROTARY, **RECURRENT},
            "vision_config": {**PACKED, "num_position_embeddings": 16},
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        {
            "text_config": {
                **TEXT,
                **PARTLY_ROTARY,
                **RECURRENT,
                **EXPERTS,
                "shared_expert_intermediate_size": 96,
            },
            "vision_config": {**PACKED, "num_position_embeddings": 16},
            **TOKENS,
        },
        _packed,
        start=(102,),
    ),
    "glm4v": Family(
        "glm4v",
        {
            "text_config": {**TEXT, **PARTLY_ROTARY},
            "vision_config": {**PACKED, "image_size": 56},
            "image_token_id": IMAGE,
            "video_token_id": 101,
            "image_start_token_id": 102,
            "image_end_token_id": 103,
            "video_start_token_id": 106,
            "video_end_token_id": 107,
        },
        _packed,
        start=(102,),
    ),
    "glm4v_moe": Family(
        "glm4v_moe",
        {
            "text_config": {
                **TEXT,
                **PARTLY_ROTARY,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
            "vision_config": {**PACKED, "image_size": 56},
            "image_token_id": IMAGE,
            "video_token_id": 101,
            "image_start_token_id": 102,
            "image_end_token_id": 103,
            "video_start_token_id": 106,
            "video_end_token_id": 107,
        },
        _packed,
        start=(102,),
    ),
    "internvl": Family(
        "internvl",
        {
            "text_config": _text("qwen2"),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": [56, 56],
                "patch_size": [14, 14],
            },
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        _plain(56),
    ),
    "llama4": Family(
        "llama4",
        {
            "text_config": {
                **TEXT,
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 96,
                "head_dim": 16,
                "moe_layers": [1],
                "attention_chunk_size": 16,
                "layer_types": ["chunked_attention", "full_attention"],
                "no_rope_layers": [1, 0],
            },
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": IMAGE,
        },
        _plain(56),
    ),
    "aria": Family(
        "aria",
        {
            "text_config": _text(
                "aria_text", head_dim=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2
            ),
            "vision_config": _tower("idefics3_vision", image_size=56),
            "projector_patch_to_query_dict": {16: 4},
            "image_token_index": IMAGE,
        },
        lambda random, ids: {
            "pixel_values": random(1, 3, 56, 56),
            "pixel_mask": torch.ones(1, 56, 56, dtype=torch.bool),
        },
    ),
    "deepseek_vl": Family(
        "deepseek_vl",
        {
            "text_config": _text("llama"),
            "vision_config": _tower("siglip_vision_model"),
            "image_token_id": IMAGE,
        },
        _plain(28),
    ),
    "lfm2_vl": Family(
        "lfm2_vl",
        {
            "text_config": _text(
                "lfm2",
                layer_types=["conv", "full_attention"],
                block_auto_adjust_ff_dim=False,
                block_ff_dim=96,
            ),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_patches": 16,
                "patch_size": 14,
                "model_type": "siglip2_vision_model",
            },
            "image_token_id": IMAGE,
            "downsample_factor": 2,
            "projector_hidden_size": 64,
        },
        lambda random, ids: {
            "pixel_values": random(1, 16, 588),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int64),
        },
    ),
    "kimi_k25": Family(
        "kimi_k25",
        {
            "text_config": _text("deepseek_v3", **LATENT),
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "patch_size": 14,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "pos_emb_time": 4,
                "merge_kernel_size": [2, 2],
            },
            "image_token_id": IMAGE,
            "projection_hidden_size": 64,
        },
        lambda random, ids: {
            "pixel_values": random(16, 3, 14, 14),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
    "qwen2_5_omni_thinker": Family(
        "qwen2_5_omni_thinker",
        {
            "text_config": {**TEXT, **ROTARY},
            "vision_config": {**PACKED, "fullatt_block_indexes": [1], "window_size": 28},
            "audio_config": SOUND,
            **TOKENS,
            "image_token_index": IMAGE,
            "video_token_index": 101,
            "audio_token_id": 108,
            "audio_token_index": 108,
            "audio_start_token_id": 109,
            "audio_end_token_id": 110,
        },
        _masked,
        start=(102,),
    ),
    "qwen3_omni_moe_thinker": Family(
        "qwen3_omni_moe_thinker",
        {
            "text_config": {**TEXT, **ROTARY, **EXPERTS, "num_hidden_layers": 3, "decoder_sparse_step": 1},
            "vision_config": {
                **PACKED,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
                "image_size": 56,
            },
            "audio_config": {**SOUND, "downsample_hidden_size": 16},
            **TOKENS,
            "audio_token_id": 108,
            "audio_start_token_id": 109,
            "audio_end_token_id": 110,
        },
        _masked,
        start=(102,),
    ),
    "phi4_multimodal": Family(
        "phi4_multimodal",
        {
            **TEXT,
            "vision_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
                "crop_size": 56,
                "image_token_id": IMAGE,
            },
            "audio_config": {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_blocks": 2,
                "num_attention_heads": 4,
                "ext_pw_out_channel": 64,
                "nemo_conv_channels": 64,
                "audio_token_id": 101,
                "input_size": 16,
                "depthwise_separable_out_channel": 64,
            },
        },
    ),
    "molmo2": Family("molmo2", {"text_config": {**TEXT, "head_dim": 16}}),
}
"""Name -> what is built."""


def known_models() -> list[str]:
    """Entries of the table that the installed Transformers has, by name."""
    from transformers import CONFIG_MAPPING

    return sorted(name for name, family in FAMILIES.items() if family.model_type in CONFIG_MAPPING)


def model_config(name: str) -> Any:
    """The tiny configuration of an entry."""
    from transformers import AutoConfig

    return AutoConfig.for_model(FAMILIES[name].model_type, **FAMILIES[name].config)


def image_rows(name: str, count: int = 6) -> list[Inputs]:
    """Rows with a random image each, of different lengths, as a processor would give them."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = []
    for number in range(count):
        text = torch.randint(3, 99, (8 + number,), generator=generator).tolist()
        ids = torch.tensor([[*text[:4], *family.start, *[IMAGE] * family.pieces, *text[4:]]])
        made = {} if family.image is None else family.image(random, ids)
        found.append({"input_ids": ids, **made})
    return found
