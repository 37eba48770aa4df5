"""Which modules are blocks, and what each linear layer does, asked from the model itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from auto_round.errors import Refusal, UnsupportedError
from auto_round.models.layer import Role

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTER = re.compile(r"(?:^|\.)router(?:\.|$)")
_MAYBE_ROUTER = re.compile(r"(?:^|[._])(?:gate|classifier|layer|wg)$")  # when as tall as there are experts
_SHARED = re.compile(r"(?:^|\.)(?:shared_experts?|shared_mlp)\.")
_ONE_OF_MANY = re.compile(r"(?:^|\.)experts\.\d+\.")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """True for layers that are a plain matrix product (and an optional bias)."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def is_transposed_linear(module: nn.Module) -> bool:
    """True for GPT-2's `Conv1D`: a linear layer that stores `[in, out]`."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, _CONVOLUTIONS)


def find_blocks(model: Any) -> tuple[str, ...]:
    """Module paths of the decoder blocks, in order.

    Raises:
        UnsupportedError: the model has no list of blocks.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = model.get_decoder()
    start = paths[id(decoder)]
    lists = [
        (f"{start}.{path}".strip("."), module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
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


def find_decoder(model: Any, block: str) -> str:
    """Module path of the smallest complete model around a block: what turns token ids into hidden states.

    `get_decoder` is not asked: for models with an unusual prefix it returns the whole model.
    """
    from transformers import PreTrainedModel

    path = block
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
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


def expert_counts(config: Any) -> frozenset[int]:
    """Numbers of experts that a configuration mentions."""
    values: Mapping[str, Any] = config.get_text_config().to_dict()
    return frozenset(v for k in _EXPERT_COUNTS if isinstance(v := values.get(k), int) and v > 1)


def role_in_block(path: str, out_features: int, experts: frozenset[int]) -> Role:
    """Role of a linear layer inside a block.

    Args:
        path: module path inside the block, for example `mlp.gate`.
        out_features: rows of its weight.
        experts: what `expert_counts` gives.
    """
    if _ROUTER.search(path) or (_MAYBE_ROUTER.search(path) and experts and out_features in experts | {1}):
        return Role.ROUTER
    if _ONE_OF_MANY.search(path):
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
