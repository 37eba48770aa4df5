"""Models that come with code of their own: a text model and one that reads images, written into a folder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from auto_round.testing.tiny_models import tiny_tokenizer

TEXT = '''
"""A text model whose parts have names that no family of Transformers has."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own_text"

    def __init__(self, vocab_size=128, hidden_size=64, inner=96, num_hidden_layers=2, heads=4, num_experts=4,
                 **named):
        self.vocab_size, self.hidden_size, self.inner = vocab_size, hidden_size, inner
        self.num_hidden_layers, self.heads, self.num_experts = num_hidden_layers, heads, num_experts
        super().__init__(**named)


class OwnExpert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wide = nn.Linear(config.hidden_size, config.inner, bias=False)
        self.narrow = nn.Linear(config.inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.narrow(torch.nn.functional.silu(self.wide(x)))


class OwnMixture(nn.Module):
    """Every token to its best expert, as old remote code does it: a list of modules."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(OwnExpert(config) for _ in range(config.num_experts))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        best = weights.argmax(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = best == number
            y[rows] = expert(x[rows]) * weights[rows][:, number, None]
        return y


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.before = nn.LayerNorm(config.hidden_size)
        self.fused = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.join = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.between = nn.LayerNorm(config.hidden_size)
        self.mixture = OwnMixture(config)

    def forward(self, states, attention_mask=None):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in
                   self.fused(self.before(states)).chunk(3, -1))
        seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()[None, None]
        if attention_mask is not None:
            own = torch.eye(q.shape[-2], dtype=torch.bool, device=q.device)
            seen = seen & (attention_mask[:, None, None, :].bool() | own)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        states = states + self.join(mixed.transpose(1, 2).flatten(-2))
        return states + self.mixture(self.between(states))


class OwnPreTrained(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "trunk"
    _no_split_modules = ["OwnBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.1)


class OwnModel(OwnPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.num_hidden_layers))
        self.last = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **named):
        states = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            states = block(states, attention_mask=attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=self.last(states))


class OwnForCausalLM(OwnPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = OwnModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.trunk.words

    def get_output_embeddings(self):
        return self.speak

    def forward(self, input_ids=None, attention_mask=None, **named):
        out = self.trunk(input_ids, attention_mask=attention_mask)
        return CausalLMOutputWithPast(logits=self.speak(out.last_hidden_state))
'''

PICTURES = '''
"""A model that reads images: the text model of its neighbour behind an encoder."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .own_text import OwnConfig, OwnModel


class OwnSeeingConfig(OwnConfig):
    model_type = "own_seeing"

    def __init__(self, image_token_id=120, patches=4, patch=12, depth=2, **named):
        self.image_token_id, self.patches, self.patch, self.depth = image_token_id, patches, patch, depth
        super().__init__(**named)


class OwnEye(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner)
        self.down = nn.Linear(config.inner, config.hidden_size)

    def forward(self, patches):
        return patches + self.down(nn.functional.gelu(self.up(patches)))


class OwnEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(config.patch, config.hidden_size)
        self.layers = nn.ModuleList(OwnEye(config) for _ in range(config.depth))

    def forward(self, pixel_values):
        patches = self.first(pixel_values)
        for layer in self.layers:
            patches = layer(patches)
        return patches


class OwnSeeingPreTrained(PreTrainedModel):
    config_class = OwnSeeingConfig
    base_model_prefix = "model"
    _no_split_modules = ["OwnBlock", "OwnEye"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.1)


class OwnSeeingModel(OwnSeeingPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = OwnEncoder(config)
        self.bridge = nn.Linear(config.hidden_size, config.hidden_size)
        self.language_model = OwnModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.words

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **named):
        states = self.language_model.words(input_ids)
        if pixel_values is not None:
            found = self.bridge(self.vision_tower(pixel_values)).flatten(0, 1).to(states.dtype)
            where = (input_ids == self.config.image_token_id)[..., None].expand_as(states)
            states = states.masked_scatter(where, found)
        return self.language_model(inputs_embeds=states, attention_mask=attention_mask)


class OwnSeeingForConditionalGeneration(OwnSeeingPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnSeeingModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.language_model.words

    def get_output_embeddings(self):
        return self.speak

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **named):
        out = self.model(input_ids, pixel_values, attention_mask)
        return CausalLMOutputWithPast(logits=self.speak(out.last_hidden_state))
'''

IMAGE, PATCHES, PATCH = 120, 4, 12
_MODELS = {
    "own_text": ("OwnConfig", "OwnForCausalLM", "AutoModelForCausalLM"),
    "own_seeing": ("OwnSeeingConfig", "OwnSeeingForConditionalGeneration", "AutoModelForImageTextToText"),
}
"""Name of the file -> its configuration, its model, and the class of Transformers that stands for it."""


def save_own(name: str, folder: Path) -> Path:
    """Write a random model with its code and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "own_text.py").write_text(TEXT)
    (folder / "own_seeing.py").write_text(PICTURES)
    config_name, model_name, auto = _MODELS[name]
    code = _package(folder, name)
    torch.manual_seed(0)
    getattr(code, model_name)(getattr(code, config_name)(tie_word_embeddings=False)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["auto_map"] = {"AutoConfig": f"{name}.{config_name}", auto: f"{name}.{model_name}"}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def _package(folder: Path, name: str) -> Any:
    """A file of the folder as a module of a package, which its neighbours belong to as well."""
    package = f"own_code_{abs(hash(str(folder)))}"
    spec = importlib.util.spec_from_loader(package, None, is_package=True)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__path__ = [str(folder)]
    sys.modules[package] = module
    return importlib.import_module(f"{package}.{name}")


def seeing_rows(count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Rows with an image each."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number in range(count):
        text = torch.randint(3, 100, (8 + number,), generator=generator).tolist()
        ids = torch.tensor([[*text[:2], *[IMAGE] * PATCHES, *text[2:]]])
        rows.append({"input_ids": ids, "pixel_values": torch.randn(1, PATCHES, PATCH, generator=generator)})
    return rows
