"""What counts as a plain matrix product, and whose weights are read by others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auto_round.facts.layer import Role
from auto_round.models.config_facts import model_facts
from auto_round.models.live import LiveSource
from auto_round.models.roles import is_linear, linear_shape
from auto_round.models.weight_readers import ASKED, CHANGED, ELSEWHERE, read_elsewhere
from auto_round.testing.tiny_models import tiny_config, tiny_model


class Transposing(nn.Linear):
    """Falcon's: the same product, written otherwise."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Grouped(nn.Linear):
    def forward(self, x):
        a, b = self.weight.chunk(2)
        return torch.cat([nn.functional.linear(x, a), 2 * nn.functional.linear(x, b)], -1)


class Failing(nn.Linear):
    def forward(self, x, groups):
        return super().forward(x) * groups


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


def test_plain_products():
    with torch.device("meta"):
        made = {
            kind: kind(64, 32, bias=kind is not Transposing) for kind in (Transposing, Grouped, Failing, Pair)
        }
        plain, attention = nn.Linear(64, 32), nn.MultiheadAttention(16, 2)
        assert is_linear(made[Transposing])  # also where everything is made on the meta device
    assert [kind for kind, module in made.items() if is_linear(module)] == [Transposing]
    assert linear_shape(made[Transposing]) == (32, 64)
    assert made[Transposing].weight.shape == (32, 64)
    assert is_linear(plain)
    assert not is_linear(attention.out_proj)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert not is_linear(normed)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("asked", "called", "handed", "doubled", "assigned", "gate"):
            self.add_module(name, nn.Linear(4, 4))
        self.inner = nn.ModuleDict({"scaled": nn.Linear(4, 4)})

    def forward(self, x):
        x = self.asked(x.to(self.asked.weight.dtype))
        x = self.called(x) + x @ self.called.weight[:, :2]
        x = nn.functional.linear(x, self.handed.weight.float())
        self.doubled.weight.mul_(2)
        self.assigned.weight.data[0] = 0
        return self.doubled(self.assigned(x)) + self.gate.weight.shape[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Mixer(), Mixer()])

    def _init_weights(self, module):
        module.called.weight.data.normal_()

    def rescale(self):
        for block in self.blocks:
            block.inner.scaled.weight.div_(2)


def test_weights_that_others_read():
    found = read_elsewhere(Model())
    for block in ("blocks.0", "blocks.1"):
        assert found.pop(f"{block}.handed") == ELSEWHERE
        assert found.pop(f"{block}.doubled") == CHANGED
        assert found.pop(f"{block}.assigned") == CHANGED
        assert found.pop(f"{block}.inner.scaled") == CHANGED
        for name in ("asked", "called", "gate"):
            assert found.pop(f"{block}.{name}") == ASKED
    assert not found


@pytest.mark.parametrize(
    ("family", "reason", "suffixes"),
    [
        ("deepseek_v32", ASKED, {"indexer.weights_proj"}),
        ("rwkv", CHANGED, {"attention.output", "feed_forward.value"}),
        ("bloom", None, set()),
        ("llama", None, set()),
    ],
)
def test_families(family, reason, suffixes):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 128}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    found = read_elsewhere(model)
    blocks = {path: why for path, why in found.items() if isinstance(model.get_submodule(path), nn.Linear)}
    assert set(blocks.values()) <= {reason}
    assert {next((s for s in suffixes if path.endswith(s)), path) for path in blocks} == suffixes


@pytest.mark.parametrize(("family", "key"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_context(family, key):
    from transformers import AutoConfig

    assert model_facts(AutoConfig.for_model(family, **{key: 77})).context == 77


def test_what_chooses_tokens_stays():
    """As what chooses experts does: no gradient leads through a choice."""
    with_indexer = LiveSource(tiny_model(tiny_config("glm_moe_dsa")))
    roles = {layer.name: layer.role for layer in with_indexer.layers if "indexer" in layer.name}
    assert len(roles) >= 3
    assert set(roles.values()) == {Role.ROUTER}
