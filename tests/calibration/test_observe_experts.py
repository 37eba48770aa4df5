"""Tokens of experts are counted as a model of Transformers sends them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from auto_round.calibration.observe_experts import observe_experts
from auto_round.models.experts import ExpertParts, multiply_by, read_call, run_experts
from auto_round.models.roles import fused_experts
from auto_round.numerics import token_weights
from auto_round.testing.tiny_models import save_tiny_model


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "phimoe", "glm4_moe"])
def test_every_token_reaches_as_many_experts_as_it_chooses(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(family, tmp_path / family))
    tokens = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    for count, mask_of in ((24, None), (20, lambda: mask)):
        with observe_experts(model, mask_of) as seen_experts, torch.no_grad():
            model(tokens)
        found = {name: seen for name, seen in seen_experts.tokens.items() if seen.any()}
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
    with observe_experts(block) as seen:
        block[0](torch.zeros(4, 4), index=torch.tensor([[0, 2], [2, 3], [2, 0], [3, 3]]))
        block[1](torch.zeros(1, 4, 4))
    assert seen.tokens["0"].tolist() == [2, 0, 3]
    block[0](torch.zeros(4, 4), torch.tensor([[1], [1], [1], [1]]))
    assert seen.tokens["0"].tolist() == [2, 0, 3]
    assert not block[0]._forward_pre_hooks


FAMILIES = ["qwen3_moe", "nemotron_h", "gpt_oss", "granitemoe"]
"""Plain; without a gate; transposed, interleaved and with biases; fused on disk."""


class Products(TorchFunctionMode):
    """Collects what Transformers' own loop over experts multiplies by each expert's matrix."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters = parameters
        self.inputs = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("linear", "matmul", "__matmul__"):
            for name, parameter in self.parameters.items():
                size = parameter[0].numel() * parameter.element_size()
                at, inside = divmod(args[1].data_ptr() - parameter.data_ptr(), size)
                if 0 <= at < len(parameter) and not inside:
                    self.inputs.setdefault((name, at), []).append(args[0].double())
        return function(*args, **(kwargs or {}))


@contextmanager
def loop_over_experts(model):
    model.set_experts_implementation("eager")
    names = [f"{path}.{n}" for path, module in model.named_modules() for n in fused_experts(module)]
    with Products({name: model.get_parameter(name) for name in names}) as products, torch.no_grad():
        yield names, products


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_each_experts_own_tokens(family, tmp_path, monkeypatch):
    monkeypatch.setattr(token_weights, "CAP", 1e9)  # every token counts in full
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(family, tmp_path / family))
    tokens = torch.arange(3, 27).reshape(2, 12)
    with loop_over_experts(model) as (names, products):
        model(tokens)
        wanted = {key: torch.cat(inputs) for key, inputs in products.inputs.items()}
    with observe_experts(model, rows_of=lambda: 2, measured=names) as seen, torch.no_grad():
        model(tokens)
    assert {key[0] for key in wanted} == set(names)
    for name in names:
        importance = seen.moments[name].importance()
        counts = seen.tokens[name.rpartition(".")[0]].tolist()
        for expert, count in enumerate(counts):
            rows = wanted.get((name, expert))
            assert (0 if rows is None else len(rows)) == count == seen.moments[name].matrix(expert).count
            if rows is None:
                assert importance.matrix(expert) is None
            else:
                squares = rows.square().mean(0).float()
                torch.testing.assert_close(importance.matrix(expert).squares, squares, rtol=1e-4, atol=1e-6)


def test_tokens_at_padding_do_not_count(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model("qwen3_moe", tmp_path / "m"))
    name = "model.layers.0.mlp.experts.down_proj"
    tokens = torch.arange(3, 27).reshape(2, 12)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 8:] = False
    found = []
    for last in (50, 60):  # what stands at padding makes no difference
        tokens[1, 8:] = last
        with observe_experts(model, lambda: mask, lambda: 2, [name]) as seen, torch.no_grad():
            model(tokens, attention_mask=mask.long())
        found.append(seen)
    first, second = found
    for expert in range(4):
        moments = [each.moments[name].matrix(expert) for each in (first, second)]
        assert moments[0].count == moments[1].count == first.tokens["model.layers.0.mlp.experts"][expert]
        if moments[0].count:
            torch.testing.assert_close(moments[0].squares, moments[1].squares)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_run_one_by_one_give_what_the_module_gives(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(family, tmp_path / family))
    _, module = next((p, m) for p, m in model.named_modules() if fused_experts(m))
    parts = ExpertParts.of(module)
    calls = []
    handle = module.register_forward_hook(
        lambda m, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.arange(3, 27).reshape(2, 12))
        handle.remove()
        (args, kwargs, wanted), *_ = calls
        call = read_call(args, kwargs)
        up, down = multiply_by(module, parts.up), multiply_by(module, parts.down)
        found = run_experts(module, call, parts.count, up, down)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        nobody = call._replace(chosen=torch.full_like(call.chosen, parts.count))
        assert not run_experts(module, nobody, parts.count, up, down).any()
