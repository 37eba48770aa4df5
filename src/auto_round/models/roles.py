"""Which modules are blocks, and the role of each linear layer, as the modules themselves show it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.layer import Role
from auto_round.models.families import LISTS

_ROUTER = re.compile(r"(?:^|[._])router(?:[._]|$)")  # one may be several layers: "gate.router_mlp.out_proj"
_MAYBE_ROUTER = re.compile(r"(?:^|[._])(?:gate|classifier|layer|wg)$")  # when as tall as there are experts
_INDEXER = re.compile(r"(?:^|\.)indexer\.")
"""Chooses tokens for a sparse attention. No gradient leads through a choice, and vLLM (0.32, DeepSeek-V3.2)
multiplies two of its three matrices as one, in 16 bits."""
_SHARED = re.compile(r"(?:^|\.)(?:shared_experts?|shared_mlp)\.")
ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
"""In the path of a matrix of one expert."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def may_route(path: str) -> bool:
    """Whether a module of this path may choose experts."""
    return bool(_ROUTER.search(path) or _MAYBE_ROUTER.search(path))


def is_linear(module: nn.Module) -> bool:
    """True for layers that are a plain matrix product (and an optional bias) by a weight `[out, in]`.

    A subclass may compute something else (grouped projections do), so it is tried on a few numbers.
    """
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if "weight" not in module._parameters:  # computed anew for every call, as with weight norm
        return False
    return type(module).forward is nn.Linear.forward or _multiplies_plainly(module)


def is_transposed_linear(module: nn.Module) -> bool:
    """True for GPT-2's `Conv1D`: a linear layer that stores `[in, out]`."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, _CONVOLUTIONS)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out, in)` of a layer that is a plain matrix product, however it is stored; None for others."""
    if is_linear(module):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if is_transposed_linear(module):
        n_in, n_out = module.get_parameter("weight").shape
        return n_out, n_in
    return None


def _multiplies_plainly(module: nn.Linear) -> bool:
    """Whether a copy of the layer with a small weight gives what a linear layer gives."""
    generator = torch.Generator("cpu").manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    weight = randn(6, 10)
    bias = randn(6) if "bias" in dict(module.named_parameters()) else None
    x = randn(2, 3, 10)
    small = copy.copy(module)
    small._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    small.out_features, small.in_features = weight.shape
    try:
        with torch.device("cpu"), torch.no_grad():  # Transformers builds models under another default device
            y = small(x)
    except Exception:  # noqa: BLE001  any failure of somebody's forward says that it is another one
        return False
    wanted = nn.functional.linear(x, weight, bias)
    return isinstance(y, torch.Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, atol=1e-5)


def find_blocks(model: Any) -> tuple[str, ...]:
    """Module paths of the decoder blocks, in order.

    Raises:
        UnsupportedError: the model has no list of blocks.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    start, lists = "", []
    for decoder in (model.get_decoder(), model.base_model, model):  # the first may be a head called "decoder"
        start = paths[id(decoder)]
        lists = [
            (f"{start}.{path}".strip("."), module)
            for path, module in decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        if lists:
            break
    outer = [(p, m) for p, m in lists if not any(p.startswith(f"{other}.") for other, _ in lists)]
    whole = set(model._no_split_modules or ())
    named = [(p, m) for p, m in outer if any(type(block).__name__ in whole for block in m)]
    candidates = named or outer
    if not candidates:
        raise UnsupportedError(
            f"no list of decoder blocks in {type(model).__name__}",
            [
                Refusal(
                    "models", f'"{start or "the model"}" holds no ModuleList', "tune single modules instead"
                )
            ],
        )
    path, blocks = max(candidates, key=lambda found: len(found[1]))
    return tuple(f"{path}.{i}" for i in range(len(blocks)))


def find_block_lists(model: Any) -> tuple[tuple[str, ...], ...]:
    """Module paths of the blocks of each list, lists in the order in which they run.

    One list, that of `find_blocks`, unless the family has a row in `families.LISTS`.
    """
    lists = LISTS.get(type(model).__name__)
    if lists is None:
        return (find_blocks(model),)
    found = (path for pattern in lists for path in _matching(model, pattern))
    return tuple(tuple(f"{path}.{i}" for i in range(len(model.get_submodule(path)))) for path in found)


def _matching(model: nn.Module, pattern: str) -> list[str]:
    """Module paths of a pattern of `families.LISTS`, in the order of the modules."""
    finder = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    lists = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    return [path for path, _ in lists if finder.fullmatch(path)]


def find_decoder(model: Any, blocks: Sequence[str]) -> str:
    """Module path of the smallest complete model around all blocks: what turns token ids into hidden states.

    `get_decoder` is not asked: for models with an unusual prefix it returns the whole model.
    """
    return _smallest_around(model, blocks)


def find_text_model(model: Any, blocks: Sequence[str]) -> str:
    """Module path of the smallest complete model around all blocks and the head: from token ids to logits.

    As a rule that is the whole model. One that reads images too may hold a whole language model.
    """
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), "")
    return _smallest_around(model, [*blocks, path])


def text_model(model: Any) -> Any:
    """What `find_text_model` finds around the blocks of a model."""
    blocks = [path for members in find_block_lists(model) for path in members]
    return model.get_submodule(find_text_model(model, blocks))


def _smallest_around(model: Any, paths: Sequence[str]) -> str:
    from transformers import PreTrainedModel

    path = paths[0]
    while path:
        path = path.rpartition(".")[0]
        around = all(inside.startswith(f"{path}.") for inside in paths)
        if around and isinstance(model.get_submodule(path), PreTrainedModel):
            break
    return path


def find_head(model: Any) -> str | None:
    """Module path of the output head; None when there is none or it is not a plain linear layer."""
    head = model.get_output_embeddings()
    if head is None or not is_linear(head):
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def find_towers(model: Any) -> tuple[str, ...]:
    """Module paths of encoders beside the decoder (vision, audio), where the model has any."""
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = paths[id(model.get_decoder())]
    known = (paths.get(id(model.get_encoder(modality=m)), "") for m in ("image", "video", "audio"))
    return tuple(sorted({path for path in known if path and not f"{decoder}.".startswith(f"{path}.")}))


def find_tower_blocks(model: Any) -> tuple[str, ...]:
    """Module paths of the lists of blocks inside encoders, where the model has any.

    Projectors and mergers, which may be lists too, are none: they are not among the classes that a model says
    are whole, or shorter than the blocks.
    """
    whole = set(model._no_split_modules or ())
    found: list[str] = []
    for tower in find_towers(model):
        lists = [
            (f"{tower}.{path}", module)
            for path, module in model.get_submodule(tower).named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
        outer = [(p, m) for p, m in lists if not any(p.startswith(f"{other}.") for other, _ in lists)]
        named = [p for p, m in outer if any(type(block).__name__ in whole for block in m)]
        longest = max((len(m) for _, m in outer), default=0)
        found += named or [p for p, m in outer if len(m) == longest][:1]
    return tuple(found)


def role_in_block(path: str, out_features: int, experts: frozenset[int]) -> Role:
    """Role of a linear layer inside a block.

    Args:
        path: module path inside the block, for example `mlp.gate`.
        out_features: rows of its weight.
        experts: what `config_facts.expert_counts` gives.
    """
    if (
        _INDEXER.search(path)
        or _ROUTER.search(path)
        or (_MAYBE_ROUTER.search(path) and experts and out_features in experts | {1})
    ):
        return Role.ROUTER
    if ONE_EXPERT.search(path):
        return Role.EXPERT
    if _SHARED.search(f"{path}."):
        return Role.SHARED_EXPERT
    return Role.LINEAR


def bare_matrices(module: nn.Module, experts: frozenset[int]) -> tuple[str, ...]:
    """Own 2-D parameters of a module that is no linear layer, no embedding and no router."""
    if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)):
        return ()
    return tuple(
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 2 and min(parameter.shape) > 1 and parameter.shape[0] not in experts
    )


def fused_experts(module: nn.Module) -> dict[str, bool]:
    """Own parameters of a module that hold one matrix per expert -> whether they are stored transposed."""
    if isinstance(module, _CONVOLUTIONS):
        return {}
    transposed = bool(module.__dict__.get("is_transposed", False))
    return {
        name: transposed
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] > 1 and min(parameter.shape[1:]) > 1
    }
