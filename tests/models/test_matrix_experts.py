"""Experts that run matrix by matrix give the bits of Transformers' grouped product, and its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.models import expert_products, matrix_experts
from auto_round.models.expert_products import filled_up
from auto_round.models.experts import ExpertParts
from auto_round.models.fused import transposed_parts
from auto_round.models.matrix_experts import MatrixExperts, using
from sweep.configurations import family_config

FAMILIES = ["qwen3_moe", "gpt_oss", "aria_text", "nemotron_h"]
"""Plain, transposed with biases and rows in turn, transposed, and without a gate."""


def experts_of(family: str, dtype: torch.dtype = torch.float32):
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=dtype).eval()
    module = next(m for m in model.modules() if ExpertParts.of(m) is not None)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.2
        parameter.requires_grad_(False)
    return module


def call(module, tokens: int = 9, experts: int = 3, dtype: torch.dtype = torch.float32):
    """Hidden states, and experts and weights of each token; the last expert is chosen by none."""
    generator = torch.Generator().manual_seed(1)
    parts = ExpertParts.of(module)
    width = module.get_parameter(parts.up).shape[-1]
    if vars(module)["is_transposed"]:
        width = module.get_parameter(parts.up).shape[-2]
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    chosen = torch.rand(tokens, experts, generator=generator).topk(2).indices
    return hidden, chosen, torch.rand(tokens, 2, generator=generator).to(dtype)


def stand_in(module) -> MatrixExperts:
    return MatrixExperts(module, ExpertParts.of(module))


class Given:
    """Matrices that keep the gradients they are handed."""

    def __init__(self, stack: torch.Tensor) -> None:
        self.stack, self.height = stack, stack.shape[1]
        self.anchor = torch.zeros((), requires_grad=True)
        self.found = torch.zeros_like(stack)

    def matrix(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        return self.stack[index].to(dtype)

    def multiply(self, *given: object) -> bool:
        return False

    def learn(self, *given: object) -> bool:
        return False

    def expect(self) -> None:
        pass

    def room(self, *given: object) -> None:
        return None

    def reached(self, index: int, gradient: torch.Tensor) -> None:
        self.found[index] += gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_same_bits(family, dtype):
    module = experts_of(family, dtype)
    given = call(module, dtype=dtype)
    assert torch.equal(stand_in(module)(*given), module(*given))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_whole_parameters(family):
    module = experts_of(family)
    hidden, chosen, weights = call(module)
    ours = stand_in(copy.deepcopy(module))
    parts = ExpertParts.of(module)
    for name in (parts.up, parts.down):
        module.get_parameter(name).requires_grad_(True)
    hidden.requires_grad_(True)
    out = module(hidden, chosen, weights)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    whole = [module.get_parameter(name) for name in (parts.up, parts.down)]
    wanted = torch.autograd.grad(out, [hidden, *whole], seed)
    up, down = (Given(ours.get_parameter(name).detach()) for name in ours.matrices)
    with using(torch.nn.ModuleDict({"e": ours}), {f"e.{parts.up}": up, f"e.{parts.down}": down}):
        made = ours(hidden, chosen, weights)
    assert torch.equal(made, out)
    (found,) = torch.autograd.grad(made, [hidden, up.anchor, down.anchor], seed)[:1]
    turned = vars(module)["is_transposed"]
    for mine, theirs in ((found, wanted[0]), (up.found, wanted[1]), (down.found, wanted[2])):
        straight = theirs.mT if turned and theirs.dim() == 3 else theirs
        if turned:  # products in which a factor lies the other way round add in another order
            torch.testing.assert_close(mine, straight, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(mine, straight)


def test_a_cast_of_all_matrices_is_never_made():
    module = experts_of("qwen3_moe", torch.bfloat16)
    ours = stand_in(copy.deepcopy(module))
    ours.keep(torch.float32)
    given = call(module)
    module.float()
    assert torch.equal(ours(*given), module(*given))
    assert ours.gate_up_proj.dtype is torch.bfloat16
    assert ours.computes_in("gate_up_proj") is torch.float32


def test_numbers_behind_the_last_expert_stand_for_none():
    module = experts_of("gpt_oss")
    hidden, chosen, weights = call(module)
    beyond = chosen.clone()
    beyond[:, 0] = 4
    alone = torch.where(torch.tensor([True, False]), 0.0, weights)
    torch.testing.assert_close(stand_in(module)(hidden, beyond, weights), module(hidden, chosen, alone))


def test_experts_of_a_model_make_way():
    for family, name in (("gpt_oss", "mlp.experts"), ("llama4_text", "feed_forward.experts")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(family_config(family)).eval()
        shapes = {n: p.shape for n, p in model.named_parameters()}
        turned = matrix_experts.install(model)
        after = {n: p.shape for n, p in model.named_parameters()}
        assert list(shapes) == list(after)
        assert {n.rpartition(".")[2] for n in turned} == {"gate_up_proj", "down_proj"}
        assert all((shapes[n] == after[n]) is (n not in turned) for n in shapes)
        module = model.get_submodule(f"model.layers.1.{name}")
        assert isinstance(module, MatrixExperts)
        assert module.by_matrix is (transposed_parts(module._fused[0]) is None)


def test_products_are_made_of_few_numbers_of_tokens():
    numbers = {filled_up(n) for n in range(1, 4097)}
    assert len(numbers) < 60
    assert all(n <= filled_up(n) <= max(n + 31, n * 9 / 8) for n in range(1, 4097))


@pytest.mark.parametrize("tokens", [1, 17, 33, 75, 300])
def test_tokens_of_zeros_change_no_bit_of_products_and_sums(tokens):
    """Neither with oneDNN nor with another library."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 96), (160, 96), (tokens, 160))
    x, w, grad = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    found = torch.empty(tokens, 160, dtype=torch.bfloat16)
    expert_products._multiply(x, w.T, found)
    assert torch.equal(found, x @ w.T)
    more = expert_products._filled_up
    assert len(more(x)) == filled_up(tokens) > tokens
    assert torch.equal(more(grad).T @ more(x), grad.T @ x)
