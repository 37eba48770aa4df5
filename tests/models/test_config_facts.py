"""Numbers that configurations of Transformers say."""

from __future__ import annotations

import pytest

from auto_round.models.config_facts import model_facts
from auto_round.testing.tiny_models import tiny_config


def test_attention_keeps_a_key_and_a_value_for_each_head_of_each_block():
    config = tiny_config("llama", num_hidden_layers=3, num_key_value_heads=2, head_dim=8)
    assert model_facts(config).cached_by_token == 2 * 3 * 2 * 8


def test_blocks_that_differ_are_counted_one_by_one():
    """Gemma 4's blocks have heads of two widths, and its configuration says none for all of them."""
    config = tiny_config("gemma4_text")
    if not getattr(config, "is_heterogeneous", False):
        pytest.skip("this Transformers gives all blocks one configuration")
    keys = sum(block.head_dim * block.num_key_value_heads for block in config.per_layer_config)
    assert len({block.head_dim for block in config.per_layer_config}) == 2
    assert model_facts(config).cached_by_token == 2 * keys
