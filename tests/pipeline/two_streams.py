"""Invented families: blocks that hand on two tensors and change both; two lists of blocks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from auto_round.facts.flow import Flow

WIDTH, SIDE = 64, 32
BLOCK = "TwoStreamBlock"
FLOW = Flow(("hidden_states", "side_states"), returned=("side_states", "hidden_states"))
"""The one row that a family like this needs."""
TWO_LISTS = ("model.layers", "model.tail")


class TwoStreamConfig(PreTrainedConfig):
    model_type = "auto_round_two_streams"

    def __init__(self, vocab_size=128, hidden_size=WIDTH, side_size=SIDE, num_hidden_layers=3, **named):
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": 0} | named)
        self.vocab_size, self.hidden_size, self.side_size = vocab_size, hidden_size, side_size
        self.num_hidden_layers = num_hidden_layers


class TwoStreamBlock(nn.Module):
    """Each stream sees the mean of the other one; what is returned first is taken by name."""

    def __init__(self, config):
        super().__init__()
        wide, narrow = config.hidden_size, config.side_size
        self.up = nn.Linear(wide, 2 * wide, bias=False)
        self.down = nn.Linear(2 * wide, wide, bias=False)
        self.side = nn.Linear(narrow, narrow, bias=False)
        self.to_side = nn.Linear(wide, narrow, bias=False)
        self.from_side = nn.Linear(narrow, wide, bias=False)

    def forward(self, hidden_states, gain, *, side_states, counted=None):
        seen = hidden_states if counted is None else hidden_states * counted
        hidden = hidden_states + gain * self.down(torch.tanh(self.up(hidden_states)))
        hidden = hidden + self.from_side(torch.tanh(side_states).mean(1, keepdim=True))
        side = side_states + self.side(torch.tanh(side_states)) + self.to_side(seen.mean(1, keepdim=True))
        return side, hidden


class TwoStreamModel(PreTrainedModel):
    config_class = TwoStreamConfig
    base_model_prefix = "model"
    _no_split_modules = (BLOCK,)

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_side = nn.Embedding(config.vocab_size, config.side_size)
        self.layers = nn.ModuleList(TwoStreamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, attention_mask=None, side_ids=None, use_cache=None):
        del use_cache
        hidden = self.embed_tokens(input_ids)
        side = self.embed_side(torch.zeros_like(input_ids[:, :1]) if side_ids is None else side_ids)
        counted = None if attention_mask is None else attention_mask.unsqueeze(-1).to(hidden.dtype)
        for i, layer in enumerate(self.layers):
            side, hidden = layer(hidden, 0.5 + i, side_states=side, counted=counted)
            side = side + 0.25
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class TwoStreamForCausalLM(PreTrainedModel):
    config_class = TwoStreamConfig
    base_model_prefix = "model"
    _no_split_modules = (BLOCK,)

    def __init__(self, config):
        super().__init__(config)
        self.model = TwoStreamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, side_ids=None, use_cache=None):
        hidden = self.model(input_ids, attention_mask, side_ids, use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


class TwoListConfig(TwoStreamConfig):
    model_type = "auto_round_two_lists"

    def __init__(self, **named):  # without one Transformers makes another
        super().__init__(**named)


class TailBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return hidden_states + self.proj(torch.tanh(hidden_states))


class TwoListModel(TwoStreamModel):
    """A norm stands between the lists, so that one does not simply follow on the other."""

    config_class = TwoListConfig

    def __init__(self, config):
        super().__init__(config)
        self.tail = nn.ModuleList(TailBlock(config) for _ in range(2))

    def forward(self, *inputs, **named):
        hidden = super().forward(*inputs, **named).last_hidden_state
        for block in self.tail:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=hidden)


class TwoListForCausalLM(TwoStreamForCausalLM):
    config_class = TwoListConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TwoListModel(config)


def register():
    """Make both families known to Transformers."""
    AutoConfig.register(TwoListConfig.model_type, TwoListConfig, exist_ok=True)
    AutoModelForCausalLM.register(TwoListConfig, TwoListForCausalLM, exist_ok=True)
    AutoConfig.register(TwoStreamConfig.model_type, TwoStreamConfig, exist_ok=True)
    AutoModelForCausalLM.register(TwoStreamConfig, TwoStreamForCausalLM, exist_ok=True)
