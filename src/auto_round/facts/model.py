"""The numbers of a model's configuration that the package works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOKENS, MASK = "input_ids", "attention_mask"
"""What language models call their tokens and which of them count."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's configuration says, asked once (`models.config_facts.model_facts`).

    Attributes:
        auto_class: name of the class of Transformers that builds and loads the model.
        text: configuration of the part that reads tokens; the whole one where there is no other part.
        vocabulary: tokens that the model knows; 0 where the configuration is silent, as for all numbers here.
        width: numbers of a hidden state.
        flowing: numbers of a token that flow from block to block: several hidden states in some families.
        heads: query heads of a block.
        context: most tokens in a row that the model has positions for; None where it is silent.
        experts: numbers of experts that are mentioned.
        chosen_experts: experts that a token passes through; 0 where there are none.
        cached_by_token: numbers that attention keeps of a token in all blocks; more than needed where the
            model keeps less.
        image_token: token that stands for a piece of an image, which may lie behind the vocabulary; -1 where
            there is none.
    """

    auto_class: str
    text: Any
    vocabulary: int
    width: int
    flowing: int
    heads: int
    context: int | None
    experts: frozenset[int]
    chosen_experts: int
    cached_by_token: int = 0
    image_token: int = -1
