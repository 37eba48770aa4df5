"""Tokens of experts are counted as a model of Transformers sends them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from auto_round.calibration.observe_experts import observe_experts
from auto_round.testing.tiny_models import save_tiny_model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "phimoe", "glm4_moe"])
def test_every_token_reaches_as_many_experts_as_it_chooses(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(family, tmp_path / family))
    tokens = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    for count, mask_of in ((24, None), (20, lambda: mask)):
        with observe_experts(model, mask_of) as counts, torch.no_grad():
            model(tokens)
        found = {name: seen for name, seen in counts.items() if seen.any()}
        assert found
        text = model.config.get_text_config()
        chosen = getattr(text, "num_experts_per_tok", None) or text.top_k
        assert {int(seen.sum()) for seen in found.values()} == {count * chosen}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4, 4))

    def forward(self, x, index):
        return x


def test_each_expert_has_its_own_count_and_an_index_behind_the_last_is_none():
    block = nn.Sequential(Experts(), nn.Conv1d(4, 4, 1))
    with observe_experts(block) as counts:
        block[0](torch.zeros(4, 4), index=torch.tensor([[0, 2], [2, 3], [2, 0], [3, 3]]))
        block[1](torch.zeros(1, 4, 4))
    assert counts["0"].tolist() == [2, 0, 3]
    block[0](torch.zeros(4, 4), torch.tensor([[1], [1], [1], [1]]))
    assert counts["0"].tolist() == [2, 0, 3]
    assert not block[0]._forward_pre_hooks
