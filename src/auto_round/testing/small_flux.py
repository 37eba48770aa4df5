"""A FLUX small enough to train and to tune within minutes, with a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer(words: Sequence[str], length: int) -> Any:
    """A tokenizer that knows these words.

    Args:
        words: one token each, numbered from 4.
        length: most tokens of a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **_SPECIAL)


def clip_encoder(*, projection: bool = False, **named: Any) -> Any:
    """A text encoder of CLIP with random weights; `named` changes its configuration."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width: Mapping[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    tokens = {"vocab_size": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = CLIPTextConfig(**{**width, **tokens, "num_hidden_layers": 2, "num_attention_heads": 2, **named})
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(**named: Any) -> Any:
    """A text encoder of T5 with random weights; `named` changes its configuration."""
    from transformers import T5Config, T5EncoderModel

    shape: Mapping[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(
        T5Config(**{"vocab_size": 64, "is_encoder_decoder": False, **shape, **named})
    ).eval()


def flux_pipeline(
    transformer: Mapping[str, Any], vae: Any, encoders: Sequence[Any], tokenizers: Sequence[Any]
) -> Any:
    """A FLUX pipeline with random weights.

    Args:
        transformer: its configuration, but for what follows from the encoders.
        vae: the autoencoder, of 4 channels.
        encoders: CLIP and T5.
        tokenizers: theirs.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    clip, t5 = encoders
    widths = {"joint_attention_dim": t5.config.d_model, "pooled_projection_dim": clip.config.hidden_size}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizers[0],
        text_encoder_2=t5,
        tokenizer_2=tokenizers[1],
        transformer=FluxTransformer2DModel(patch_size=1, in_channels=16, **widths, **transformer).eval(),
    )
