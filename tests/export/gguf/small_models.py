"""Small models of GGUF families with tokenizers that llama.cpp knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auto_round.testing.tiny_models import tiny_config, tiny_model

BYTES = 256
WORDS = ["th", "he", "in", "the", "an", "\u0120t", "\u0120a", "\u0120the", "er", "on"]
MERGES = [("t", "h"), ("h", "e"), ("i", "n"), ("th", "e"), ("a", "n"), ("\u0120", "t"), ("\u0120", "a")]
SPECIAL = ["<|end|>", "<|start|>"]
VOCABULARY = 288

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "stablelm": {"qk_layernorm": False, "use_parallel_residual": True},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 1]},
}
"""Families of `testing.tiny_models` and what their configurations need besides `SIZES`."""


def byte_level_tokenizer(*, digits: bool = False) -> Any:
    """Byte-level BPE with a few merges, cut like GPT-2 (`digits`: and every digit apart)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = ["".join(pair) for pair in MERGES]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *made])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if digits else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[0])


def sentencepiece_tokenizer() -> Any:
    """BPE as SentencePiece has it: marks for blanks, single bytes for what is not in the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{i:02X}>" for i in range(BYTES)]
    letters = [space, *"abcdehinrt"]
    merges = [(space, "t"), ("h", "e"), (space + "t", "he"), ("a", "n")]
    made = ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate([*special, *octets, *letters, *made])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def small_config(family: str, **changes: Any) -> Any:
    """Configuration of a family, with rows of 64 and 96."""
    return tiny_config(family, **{**SIZES, **FAMILIES[family], **changes})


def save_small_model(family: str, folder: Path, *, tokenizer: Any = None, **changes: Any) -> Path:
    """Write a random model and its tokenizer, as `save_pretrained` does."""
    tiny_model(small_config(family, **changes)).save_pretrained(folder)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
    return folder
