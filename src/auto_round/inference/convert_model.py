"""What Transformers calls to load a quantized checkpoint: before its weights are read and after.

Source: Transformers 5 `quantizers/quantizer_auto_round.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.inference.disk_names import ConfigNames, DiskNames
from auto_round.inference.experts import PackedExperts
from auto_round.inference.grouped_experts import GroupedExperts
from auto_round.inference.mapped import MappedFiles
from auto_round.inference.pack_experts import Kernels, expert_names, pack_experts
from auto_round.inference.qlinear import ORDER, PackedWeight, QuantLinear, named
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import AUTO, select_kernel
from auto_round.log import logger
from auto_round.models.roles import find_block_lists, linear_shape
from auto_round.schemes.vocabulary import KEPT_BITS
from auto_round.stored.formats import StoredFormats, StoredLayer

_READ_MARK = "_is_hf_initialized"
"""What Transformers sets on every tensor that it read from a checkpoint."""

_SHOWN = 8


def infer_target_device(device_map: Any = None) -> str:
    """Kind of device that will run the quantized layers, for example `cpu` or `cuda`.

    Args:
        device_map: what the user gave to `from_pretrained`: None, a device, a number, a mapping from modules
            to devices, or a strategy such as `auto`.
    """
    if device_map is None:
        return "cpu"
    if isinstance(device_map, Mapping):
        kinds = [_kind(device) for device in device_map.values()]
        return next((kind for kind in kinds if kind not in ("cpu", "disk", "meta")), "cpu")
    return _kind(device_map)


def convert_hf_model(model: Any, target_device: str = "cpu") -> tuple[Any, list[str]]:
    """Replace the quantized linear layers of a model by ones that can be filled from its checkpoint.

    Args:
        model: a Transformers model without weights, with `config.quantization_config`.
        target_device: kind of device that will run them.

    Returns:
        The model, changed in place, and the names of the kernels that will run it.

    Raises:
        ConfigError: a configuration that contradicts itself or the model, or an unknown backend.
        UnsupportedError: a format, an order of bytes or a layer that cannot be loaded, with the reasons.
    """
    config = _config_of(model)
    stored = StoredFormats.read(config, _block_prefixes(model))
    backend = str(config.get("backend") or AUTO)
    names = ConfigNames.of(DiskNames.of(model), stored.exact, stored.blocks)
    shapes = {path: s for path, module in model.named_modules() if (s := linear_shape(module)) is not None}
    linear = {path: names.of_layer(path) for path in shapes}
    stored = stored.among([*linear.values(), *expert_names(model, names)])
    experts = pack_experts(model, stored, names, Kernels(target_device, backend))
    used = {module.kernel.name: None for module in model.modules() if isinstance(module, QuantLinear)}
    kept = False
    for path, known in linear.items():
        module = model.get_submodule(path)
        how = stored.layer(known)
        if how is None or not _holds(how, shapes[path], path):
            kept = kept or any(name in stored.extra for name in known)
            continue
        spec = LinearSpec(how.format, shapes[path], module.weight.dtype, target_device, how.inputs, how.held)
        kernel = select_kernel(spec, backend)
        model.set_submodule(path, QuantLinear(spec, how.layout, kernel, module.bias, backend))
        used[kernel.name] = None
    if not used and not experts and not kept:  # a folder may say of every layer that it stays as it was
        raise ConfigError(
            "quantization_config names no linear layer of this model; "
            f"quantized are layers below {list(stored.blocks)} and {list(stored.extra)}"
        )
    return model, list(used)


def post_init(model: Any, used_backends: list[str] | None = None) -> None:
    """Hand the loaded weights to the kernels; the memory of each layer's stored tensors is freed at once.

    Raises:
        CheckpointError: stored tensors that are missing or contradict the configuration, with their names.
        UnsupportedError: layers left on disk, or on a device that the chosen backend does not run on.
    """
    del used_backends  # each layer knows its kernel
    config = _config_of(model)
    backend = str(config.get("backend") or AUTO)
    _drop_unread_orders(model, reordered=bool(config.get("desc_act")))
    _check_complete(model)
    _check_devices(model)
    files = MappedFiles.now()
    modules = list(model.named_modules())
    on_disk = {id(w): n for _, m in modules if isinstance(m, PackedExperts) for n, w in m.on_disk().items()}
    for path, module in modules:
        name = on_disk.get(id(module), path)
        try:
            if isinstance(module, QuantLinear):
                _adopt(module, backend, files)
            elif isinstance(module, PackedExperts) and not isinstance(module, GroupedExperts):
                model.set_submodule(path, module.dequantize(model))
                _record_as_plain(model, module.layers)
        except CheckpointError as error:
            raise CheckpointError(f'layer "{name}": {error}') from error
        except UnsupportedError as error:
            raise named(name, error) from error
    _answer_for(model)


def change_backend(model: Any, backend: str = AUTO) -> None:
    """Run the quantized layers of a loaded model with other kernels, where others are chosen.

    Raises:
        UnsupportedError: the backend cannot run a layer, with the reasons.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            kernel = select_kernel(module.spec, backend)
            module.backend = backend
            if kernel is not module.kernel:
                module.change_kernel(kernel, module.spec)


def _drop_unread_orders(model: Any, *, reordered: bool) -> None:
    """Do without `g_idx` where a GPTQ checkpoint has none, unless it says that inputs are reordered.

    Raises:
        UnsupportedError: inputs may be reordered, and the checkpoint does not say how.
    """
    weights = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedWeight)]
    if not any(_READ_MARK in vars(part) for _, m in weights for part in m.parts().values()):
        return  # tensors that were moved have lost the mark
    for name, module in weights:
        if module.ordered and _READ_MARK not in vars(module.parts()[ORDER]):
            if reordered:
                what = "inputs are reordered by activation (desc_act), but g_idx is missing"
                raise named(name, UnsupportedError(what, [Refusal("auto_round", "the order is not known")]))
            module.drop_order()


def _check_complete(model: Any) -> None:
    """Refuse a checkpoint that lacks a packed tensor: Transformers only warns and leaves arbitrary bytes.

    It marks the tensors that it has read. Tensors that were moved to several devices afterwards have lost the
    mark, so nothing can be said of those.
    """
    stored = {
        f"{name}.{suffix}": part
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight) and not (isinstance(module, QuantLinear) and module.adopted)
        for suffix, part in module.parts().items()
    }
    missing = [name for name, part in stored.items() if _READ_MARK not in vars(part)]
    if missing and len(missing) < len(stored) and len({part.device for part in stored.values()}) == 1:
        raise CheckpointError(
            f"{len(missing)} of {len(stored)} packed tensors are missing from the checkpoint: "
            f"{', '.join(missing[:_SHOWN])}; its configuration says that these layers are quantized"
        )


def _check_devices(model: Any) -> None:
    """Refuse quantized layers on a CPU beside others on an accelerator.

    Such layers are not run on the CPU: their tensors would be copied to the accelerator for every call, by
    names that kernels do not keep.

    Raises:
        UnsupportedError: a device map with both, with some of the layers.
    """
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and not module.adopted:
            kinds.setdefault(next(iter(module.parts().values())).device.type, []).append(name)
    if "cpu" in kinds and set(kinds) - {"cpu", "meta"}:
        shown = ", ".join(kinds["cpu"][:_SHOWN])
        raise UnsupportedError(
            f"{len(kinds['cpu'])} quantized layers were left to the CPU beside an accelerator ({shown})",
            [Refusal("auto_round", "does not offload", "give more memory per device in max_memory, or cpu")],
        )


def _answer_for(model: Any) -> None:
    from auto_round.inference.loaded import answer_for  # Transformers' quantizers are slow to import

    answer_for(model)


def _adopt(module: QuantLinear, backend: str, files: MappedFiles) -> None:
    stored = list(module.parts().values())
    device = stored[0].device.type
    spec, kernel = module.spec, module.kernel
    if device not in ("meta", spec.device):
        spec = replace(spec, device=device)
        kernel = select_kernel(spec, backend)
    module.adopt(kernel, spec)
    kept = {part.data_ptr() for part in module.buffers()}
    for part in stored:
        if part.data_ptr() not in kept:
            files.give_back(part)


def _record_as_plain(model: Any, layers: tuple[str, ...]) -> None:
    """Note that layers are no longer quantized, so that the model can be saved and loaded again."""
    config = model.config.quantization_config
    fields = config if isinstance(config, dict) else vars(config)
    kept = {"bits": KEPT_BITS, "data_type": "float"}
    fields["extra_config"] = {**(fields.get("extra_config") or {}), **dict.fromkeys(layers, kept)}


def _kind(device: Any) -> str:
    """Kind of one device of a device map."""
    if isinstance(device, torch.device):
        return device.type
    text = str(device)
    if text.isdigit() or text.startswith(("auto", "balanced", "sequential")):
        best = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if best is None else best.type
    return text.partition(":")[0]


def _config_of(model: Any) -> Mapping[str, Any]:
    """`quantization_config` as a mapping."""
    config = model.config.quantization_config
    if isinstance(config, Mapping):
        return config
    return dict(vars(config))


def _block_prefixes(model: Any) -> tuple[str, ...]:
    """Module path of each list of blocks, for example `model.layers`."""
    return tuple(blocks[0].rpartition(".")[0] for blocks in find_block_lists(model))


def _holds(how: StoredLayer, shape: tuple[int, int], name: str) -> bool:
    """Whether the byte order can hold a layer at all; exporters keep the others as they were."""
    refusal = how.layout.accepts(how.format, shape)
    if refusal is not None:
        logger.debug("%s is read as not quantized: %s", name, refusal)
    return refusal is None
