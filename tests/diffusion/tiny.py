"""Random tiny pipelines of diffusers in folders; their tokenizers know a few words and need no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from auto_round.testing.small_flux import clip_encoder, flux_pipeline, t5_encoder, word_tokenizer

WORDS = [*("a", "an", "the", "on", "in", "of"), *("dog", "cat", "man", "riding", "photo", "circle", "square")]
WORDS += ["red", "blue", "green", "small", "large"]
CAPTIONS = [
    "a photo of a dog",
    "a red cat on the square",
    "a man riding a blue dog",
    "the small green circle in a photo",
    "a large cat",
    "a blue square on the red circle",
    " ".join(["a red cat on the square"] * 8),
]


def tokenizer(length: int) -> Any:
    return word_tokenizer(WORDS, length)


def umt5() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return UMT5EncoderModel(config).eval()


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    return Qwen3Model(config).eval()


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 64,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
        vocab_size=64,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def vae(**named: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (4,),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 1,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.06,
            "scaling_factor": 1.5,
        }
        | named
    ).eval()


def wide_flux(depth: int) -> Any:
    """A FLUX whose blocks hold 9.4 MB each."""
    return flux(depth, 0, heads=16)


def flux(depth: int = 2, singles: int = 2, heads: int = 2) -> Any:
    shape = {"num_layers": depth, "num_single_layers": singles, "num_attention_heads": heads}
    shape |= {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    encoders = clip_encoder(), t5_encoder()
    return flux_pipeline(shape, vae(), encoders, (tokenizer(77), tokenizer(64)))


def sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip_encoder(projection=True),
        tokenizer=tokenizer(77),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5_encoder(d_model=64),
        tokenizer_3=tokenizer(64),
        transformer=transformer.eval(),
    )


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(**_video_vae()).eval(),
        text_encoder=qwen2_5_vl(),
        tokenizer=tokenizer(1058),
        transformer=transformer.eval(),
    )


def wan() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=AutoencoderKLWan(**_video_vae()).eval(),
        text_encoder=umt5(),
        tokenizer=tokenizer(512),
        transformer=transformer.eval(),
    )


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):  # which is left as memory was
            parameter.data.normal_()
    words = tokenizer(512)
    words.chat_template = "a photo of {% for m in messages %}{{ m['content'] }}{% endfor %}"
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=qwen3(),
        tokenizer=words,
        transformer=transformer.eval(),
    )


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        vae=vae(shift_factor=None),
        text_encoder=clip_encoder(),
        tokenizer=tokenizer(77),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer_2=tokenizer(77),
        unet=unet.eval(),
    )


def _video_vae() -> dict[str, Any]:
    return {
        "base_dim": 3,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }


FAMILIES = {
    "flux": (flux, {"height": 16, "width": 16, "max_sequence_length": 16}),
    "sd3": (sd3, {"height": 8, "width": 8, "max_sequence_length": 16}),
    "qwen_image": (qwen_image, {"height": 32, "width": 32}),
    "wan": (wan, {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}),
    "z_image": (z_image, {"height": 32, "width": 32, "max_sequence_length": 64}),
    "sdxl": (sdxl, {"height": 16, "width": 16}),
}
"""Name -> how a pipeline is made, and what it is called with."""


def save(build: Any, folder: Path, **named: Any) -> Path:
    """A pipeline of fixed random weights in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build(**named)
    pipeline.save_pretrained(folder)
    return folder
