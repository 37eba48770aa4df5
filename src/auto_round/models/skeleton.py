"""A Transformers model without weights: every parameter on the meta device, derived buffers real."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.errors import ConfigError, MissingError, Refusal, UnsupportedError
from auto_round.facts.tensor import TensorSpec
from auto_round.models import causal_attention, matrix_experts
from auto_round.models.auto_classes import auto_class, auto_class_name
from auto_round.models.materialize import META
from auto_round.models.roles import is_transposed_linear

_HAS_TABLE = "has_relative_attention_bias"


def read_model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration in a model folder, of the plain model where it is quantized.

    Raises:
        ConfigError: there is none, it cannot be parsed, or it needs code from the folder that is not trusted.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise MissingError(
            f'no "config.json" in "{folder}": expected a folder as written by save_pretrained '
            "or downloaded from a hub; give the folder that holds config.json and the .safetensors files"
        )
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f'cannot read "{folder / "config.json"}": {error}{_code_hint(error)}') from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """A causal language model on the meta device, in evaluation mode.

    Args:
        config: the model's configuration.
        dtype: dtype of its weights; those that the model wants in float32 stay float32.
        trust_remote_code: run model code that lies in the model's folder.

    Raises:
        UnsupportedError: Transformers has no causal language model for this configuration.
        ConfigError: the model needs code from its folder that is not trusted.
    """
    try:
        with META:
            model = auto_class(auto_class_name(config)).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, ImportError) as error:
        if hint := _code_hint(error):
            raise ConfigError(f'cannot build model type "{config.model_type}": {error}{hint}') from error
        unknown = "Unrecognized configuration class" in str(error)
        raise UnsupportedError(
            f'cannot build a causal language model of type "{config.model_type}"',
            [
                Refusal(
                    "transformers",
                    "it has none for this type" if unknown else str(error).strip().split("\n", 1)[0],
                    "models that write text only; a newer Transformers may know more",
                )
            ],
        ) from error
    return _made_ready(model)


def build_kind(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class of Transformers on the meta device, in evaluation mode; see `build_skeleton`."""
    with META:
        model = kind._from_config(config, dtype=dtype)
    return _made_ready(model)


def _made_ready(model: Any) -> Any:
    causal_attention.install(model)
    model.requires_grad_(False)
    return model.eval()


def _code_hint(error: Exception) -> str:
    return (
        "; to run the code in that folder, pass trust_remote_code"
        if "trust_remote_code" in str(error)
        else ""
    )


def straighten(model: nn.Module) -> frozenset[str]:
    """Replace layers that store `[in, out]` by ordinary linear layers on the meta device, in place.

    Fused experts too, of whatever order, make way for ones that run matrix by matrix.

    Returns:
        Names of the weights that lie the other way round on disk.
    """
    found = [*matrix_experts.install(model)]
    for path, module in list(model.named_modules()):
        if is_transposed_linear(module):
            weight = module.get_parameter("weight")
            n_in, n_out = weight.shape
            linear = nn.Linear(n_in, n_out, bias=False, device=META, dtype=weight.dtype)
            linear.weight.requires_grad_(False)
            linear.bias = module.get_parameter("bias")
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear.train(module.training))
            found.append(f"{path}.weight")
    return frozenset(found)


def share_position_tables(model: nn.Module) -> dict[str, str]:
    """Let every block look up its position biases itself, in place.

    T5 has one table for all blocks: the first block looks them up, and hands them on. With the table in
    each of them a block can run alone.

    Returns:
        Names of the further tables -> name of the one that they are.
    """
    found: dict[str, str] = {}
    for members in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        inside = [dict(block.named_modules()) for block in members]
        for path, first in inside[0].items() if inside else ():
            others = [modules[path] for modules in inside[1:] if path in modules]
            if not getattr(first, _HAS_TABLE, False) or any(getattr(m, _HAS_TABLE, True) for m in others):
                continue
            for other in others:
                setattr(other, _HAS_TABLE, True)
                other.relative_attention_bias = first.relative_attention_bias
    known: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".relative_attention_bias.weight"):
            shared = known.setdefault(id(parameter), name)
            found |= {} if shared == name else {name: shared}
    return found


def fill_derived(model: Any, absent: Collection[str]) -> None:
    """Give real values to everything that no checkpoint holds, as `from_pretrained` does.

    Those are the buffers outside the state dict (rotary frequencies, embedding scales) and the tensors in
    `absent`; the model's own initialisation computes them. All other tensors stay on the meta device.
    """
    saved = model.state_dict()
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name not in saved or name in absent:
            _put(model, name, torch.empty_like(buffer, device="cpu"))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in absent:
            _put(model, name, nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
    # Transformers' own marks: a tensor that carries one is left alone by the initialisation.
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = tensor.device == META
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def tied_weights(model: Any) -> dict[str, str]:
    """Module names that share another one's tensor -> the name that they share."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names and in the shapes in which `save_pretrained` would write them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def saved_specs(model: Any, tied: Collection[str] | None = None) -> dict[str, TensorSpec]:
    """What `save_pretrained` would write of a model, without its weights.

    Args:
        model: the skeleton.
        tied: tensors that share another one's data and are not written; None for all that the model ties.
    """
    left_out = tied_weights(model) if tied is None else tied
    saved = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in as_saved(model, saved).items()}


def untie(model: nn.Module, name: str) -> None:
    """Give a tied parameter a tensor of its own (for checkpoints that hold two different ones)."""
    _put(model, name, nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False))


def absent_by_design(model: Any, missing: Collection[str]) -> set[str]:
    """Those of the missing tensors that the model itself declares may be missing."""
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    return {name for name in missing if any(p.search(name) for p in patterns)}


def weight_dtypes(model: Any, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Dtype of every tensor, derived buffers too, when the model computes in `dtype`.

    Tensors that the model makes in another dtype than its weights' keep it; a model may ask for float32 for
    some modules when its weights are 16 bits wide.
    """
    keep = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        keep |= set(model._keep_in_fp32_modules or ())
    keeps = [re.compile(k.replace("*", ".*")) for k in keep]
    own: torch.dtype = model.dtype
    # Which tensors of a float32 model stay so in any case shows one that is built narrower.
    built = dtypes_when_built(model, dtype) if own == torch.float32 != dtype else {}
    saved = model.state_dict().keys()

    def choose(name: str, tensor: Tensor) -> torch.dtype:
        if name in saved and any(k.search(name) for k in keeps):
            return torch.float32
        return built.get(name, dtype if tensor.dtype == own else tensor.dtype)

    return {name: choose(name, tensor) for name, tensor in _named_tensors(model)}


def dtypes_when_built(model: Any, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """Dtype of every tensor of a model of the same class and configuration that is built in `dtype`.

    Nothing for a class of the user's that is not built of a configuration alone.
    """
    more = list(inspect.signature(type(model).__init__).parameters.values())[2:]
    if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in more):
        return {}
    with META:
        built = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    return {name: tensor.dtype for name, tensor in _named_tensors(built)}


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)
