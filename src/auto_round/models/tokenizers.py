"""Tokenizers that Transformers makes of a folder without tokenizer files: they know no word."""

from __future__ import annotations

from typing import Any


def refuse_empty(tokenizer: Any) -> None:
    """Refuse a tokenizer whose vocabulary holds special tokens at most.

    Raises:
        ValueError: it does.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError("its files are missing: the vocabulary is empty")
