"""State that reaches a block, or the end of a model, beside what flows: refused before work, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from auto_round.errors import UnsupportedError
from auto_round.models import rehearsal
from auto_round.models.folder import FolderSource
from auto_round.models.live import LiveSource
from sweep.configurations import known_families

WIDTH = 32


class WayConfig(PreTrainedConfig):
    model_type = "auto_round_ways"

    def __init__(self, way="plain", vocab_size=64, hidden_size=WIDTH, num_hidden_layers=3, **named):
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": 0} | named)
        self.way, self.vocab_size, self.hidden_size = way, vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers


KEPT = {}
"""What blocks leave in their file: tables, or state."""


class Memory:
    """An object that several blocks hold."""

    kept = None


class WayBlock(nn.Module):
    last = None

    def __init__(self, config, index, shared, memory):
        super().__init__()
        self.config, self.index = config, index
        self.shared, self.memory = shared, memory
        self.alone = Memory()
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, beside=None):
        if leave := LEAVE.get(self.config.way):
            leave(self, hidden_states * 2, beside)
        after = hidden_states + self.down(torch.tanh(self.up(hidden_states)))
        if not self.config.way.startswith("second"):
            return after
        second = SECOND.get(self.config.way, lambda _, kept: kept)
        return after, second(self, after.mean(-1))


def leave_nothing_for_others(block, kept, beside):
    """What nobody asks for, tables that do not depend on what flows, and numbers."""
    block.nobody_asks = block.alone.kept = block.up.nobody_asks = kept
    KEPT.setdefault(kept.shape, torch.ones(kept.shape))
    block.config.blocks_run = block.index


LEAVE = {
    "mapping for later blocks": lambda block, kept, beside: beside.setdefault("first", kept),
    "mapping with a number": lambda block, kept, beside: beside.update(first=kept, count=3),
    "mapping with a list": lambda block, kept, beside: beside.setdefault("all", []).append(kept),
    "mapping that is emptied": lambda block, kept, beside: (
        beside.clear() if beside else beside.update(first=kept)
    ),
    "mapping read at the end": lambda block, kept, beside: beside.setdefault("first", kept),
    "mapping read by the model": lambda block, kept, beside: beside.setdefault("first", kept),
    "mapping anew": lambda block, kept, beside: beside.setdefault("first", kept),
    "list with places": lambda block, kept, beside: beside.__setitem__(block.index, kept),
    "choices in a list": lambda block, kept, beside: beside.__setitem__(block.index, kept.argmax(-1)),
    "object": lambda block, kept, beside: setattr(beside, "kept", kept),
    "tensor in place": lambda block, kept, beside: beside.add_(kept.sum(-1).detach()),
    "own attribute": lambda block, kept, beside: setattr(block, "last", kept),
    "attribute of a shared module": lambda block, kept, beside: setattr(block.shared, "last", kept),
    "buffer of a shared module": lambda block, kept, beside: setattr(block.shared, "seen", kept.mean()),
    "shared object": lambda block, kept, beside: setattr(block.memory, "kept", kept),
    "configuration": lambda block, kept, beside: setattr(block.config, "kept", kept),
    "file": lambda block, kept, beside: KEPT.update({block.index: kept}),
    "choices in the file": lambda block, kept, beside: KEPT.update({block.index: kept.argmax(-1)}),
    "class": lambda block, kept, beside: setattr(WayBlock, "kept", kept),
    "harmless": leave_nothing_for_others,
}
"""Way -> what a block leaves behind."""

SECOND = {
    "second to the next": lambda block, kept: kept,
    "second of the first": lambda block, kept: kept,
    "second kept where a block has none": lambda block, kept: None if block.index == 1 else kept,
    "second in a list": lambda block, kept: [kept],
    "second by name": lambda block, kept: {"first": kept},
    "second of another shape": lambda block, kept: kept.repeat(1, 1 + block.index),
}
"""Way -> what a block returns behind the hidden states; elsewhere a tensor."""


def to_the_next(way, seconds):
    """What the model gives of all that blocks have returned so far."""
    if way == "second of the first":
        return next(iter(seconds), None)
    return next((second for second in reversed(seconds) if second is not None), None)


def mappings_of(way, count):
    """What each block may fill: one mapping, or the first one its own."""
    one = {}
    return [{} if way == "mapping anew" and index == 0 else one for index in range(count)]


def with_mapping(hidden, mapping, *, read):
    """Hidden states, and what blocks put into a mapping if the model reads it."""
    return hidden + mapping["first"] if read and mapping else hidden


class WayModel(PreTrainedModel):
    config_class = WayConfig
    base_model_prefix = "model"
    _no_split_modules = ("WayBlock",)

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        shared, memory, count = nn.Identity(), Memory(), config.num_hidden_layers
        shared.register_buffer("seen", torch.zeros(()), persistent=False)
        self.layers = nn.ModuleList(WayBlock(config, i, shared, memory) for i in range(count))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        del attention_mask, use_cache
        way = self.config.way
        hidden = embedded = self.embed_tokens(input_ids)
        stack, memory, second, seconds = [], {"chosen": None}, None, []
        mappings = mappings_of(way, len(self.layers))
        places, carried, sums = [0] * len(self.layers), Memory(), torch.zeros(input_ids.shape)
        for layer in self.layers:
            by_later = mappings[layer.index]
            hidden = with_mapping(hidden, by_later, read=way == "mapping read by the model")
            if way == "plain" and stack:
                hidden = hidden + 0.5 * embedded
            beside = {
                "plain": lambda: (embedded, {"mask": None}, 3),
                "stack": lambda: torch.stack([embedded, *stack], 2),
                "mixed": lambda: self.mix(stack[-1] if stack else embedded),
                "choices": lambda h=hidden: h.argmax(-1),
                "nested": lambda h=hidden: {"of": [(h > 0.5, None)]},
                "numbers": lambda h=hidden: h.sum().item(),
                "in a mapping": lambda: (memory, 1),
                **{name: lambda m=by_later: m for name in LEAVE if name.startswith("mapping")},
                "list with places": lambda: places,
                "choices in a list": lambda: places,
                "object": lambda: carried,
                "tensor in place": lambda: sums,
            }.get(way, lambda: None)()
            hidden = layer(hidden, to_the_next(way, seconds) if way in SECOND else beside)
            if way.startswith("second"):
                hidden, second = hidden
                seconds.append(second)
            stack.append(hidden)
            if layer.last is not None:
                hidden = hidden + layer.last
            if way == "scaled":
                hidden = hidden * 1.5
        hidden = with_mapping(hidden, mappings[-1], read=way == "mapping read at the end")
        if way == "second at the end" and second is not None:
            hidden = hidden + second[..., None]
        if way == "first block at the end":
            hidden = hidden + self.mix(stack[0])
        if way == "embedding at the end":
            hidden = hidden + self.mix(embedded)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))


class WayForCausalLM(PreTrainedModel):
    config_class = WayConfig
    base_model_prefix = "model"
    _no_split_modules = ("WayBlock",)

    def __init__(self, config):
        super().__init__(config)
        self.model = WayModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


def source_of(way):
    torch.manual_seed(0)
    return LiveSource(WayForCausalLM(WayConfig(way)))


@pytest.mark.parametrize("way", ["second to the next", "mapping for later blocks"])
def test_what_a_block_hands_on_beside_what_flows_is_no_state(way):
    """It goes with what flows, in rows of its own."""
    source = source_of(way)
    source.refuse_untraceable()
    with source.stem() as stem:
        trace = stem.trace({"input_ids": torch.arange(12).reshape(2, 6)})
    numbers = {"second to the next": 6, "mapping for later blocks": 6 * WIDTH}[way]
    assert [state.shape for state in trace.states] == [(2, 6, WIDTH), (2, 1, numbers)]
    first, *later = (call.carried for call in trace.calls)
    assert not first[0].present
    assert all(each[0].name == "beside" and len(each[0].present) == 1 for each in later)


@pytest.mark.parametrize("way", ["plain", "harmless", "second for nobody"])
def test_what_comes_of_the_tokens_alone_is_no_state(way):
    source = source_of(way)
    source.refuse_untraceable()
    with source.stem() as stem:
        trace = stem.trace({"input_ids": torch.arange(6)[None]})
    assert [edit[0] is None for edit in trace.edits] == [True, *[way != "plain"] * 2]
    assert not KEPT


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # as the family does
@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("stack", 'block 1 is given "beside", which is computed from what earlier blocks hand on'),
        ("mixed", 'block 1 is given "beside"'),
        ("choices", 'block 1 is given "beside"'),
        ("nested", 'block 1 is given "beside"'),
        ("numbers", 'block 1 is given "beside"'),
        ("scaled", "before block 1 the model computes with the hidden states"),
        ("in a mapping", 'hand on state to later blocks in "argument 1"'),
        ("first block at the end", "behind its last block the model reads more"),
        ("embedding at the end", "behind its last block the model reads more"),
        ("second at the end", "behind its last block the model reads more"),
        ("second of the first", 'block 1 is given "beside", which is computed'),
        ("second kept where a block has none", '"beside", and not all that is given to a block is handed on'),
        ("second in a list", '"beside", which holds more than tensors in tuples'),
        ("second by name", '"beside", which holds more than tensors in tuples'),
        ("second of another shape", '"beside", whose shape or number type changes on the way'),
        ("mapping with a number", '"beside", which holds more than tensors in tuples'),
        ("mapping with a list", '"beside", which holds more than tensors in tuples'),
        ("mapping that is emptied", '"beside", and not all that is given to a block is handed on'),
        ("mapping read at the end", "behind its last block the model reads more"),
        ("mapping read by the model", "the model computes with the hidden states"),
        ("mapping anew", 'hand on state to later blocks in "argument 1"'),
        ("list with places", 'leaves state for others in "beside"'),
        ("choices in a list", 'leaves state for others in "beside"'),
        ("object", 'leaves state for others in "beside.kept"'),
        ("tensor in place", 'leaves state for others in "beside"'),
        ("own attribute", 'leaves state for others in "WayBlock.last"'),
        ("attribute of a shared module", 'leaves state for others in "Identity.last"'),
        ("buffer of a shared module", 'leaves state for others in "Identity.seen"'),
        ("shared object", 'leaves state for others in "WayBlock.memory.kept"'),
        ("configuration", 'leaves state for others in "WayBlock.config.kept"'),
        ("file", "leaves state for others in .*KEPT"),
        ("choices in the file", "leaves state for others in .*KEPT"),
        ("class", 'leaves state for others in "WayBlock.kept"'),
    ],
)
def test_state_beside_what_flows_is_refused_without_weights(way, reason, monkeypatch):
    source = source_of(way)
    monkeypatch.setattr(LiveSource, "_fetch", None)
    with pytest.raises(UnsupportedError, match=reason) as refused:
        source.refuse_untraceable()
    assert "--recipe rtn" in str(refused.value)
    assert not KEPT
    assert not hasattr(WayBlock, "kept")
    assert not hasattr(source.config, "kept")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_blocks_run_without_weights(saved, monkeypatch, family):
    """One that does not is passed over, and what it leaves behind is not found."""
    if family not in known_families():
        pytest.skip("this Transformers has no such family")
    monkeypatch.setattr(rehearsal, "WANTS_WEIGHTS", ())
    with FolderSource.open(saved(family)) as source:
        source.refuse_untraceable()


@pytest.mark.parametrize("turned", [False, True])
def test_products_with_weights_that_take_no_memory_are_not_computed(turned):
    """As experts multiply, whose matrices may be copied first: here 40 GB, and seconds for each product."""
    weight = torch.zeros(()).expand(100_000, 100_000)
    x, out = torch.ones(2, 100_000), torch.ones(2, 100_000)
    with rehearsal.WeightlessProducts():
        factor = weight.T.contiguous() if turned else weight.T
        assert torch.mm(x, factor, out=out) is out
        assert not out.any()
        assert not (x @ factor).any()
