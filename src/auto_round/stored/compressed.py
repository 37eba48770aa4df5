"""Folders of `compressed-tensors`: which config group a layer belongs to, and what is stored of it.

A layer is packed when its tensors are. Its numbers are those of the first config group that names it, else of
the first whose expression (`re:`) meets the beginning of its name, else of the first for a class of modules.

Source: compressed-tensors 0.20 `utils/match.py` (`match_targets`), `compressors/base.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.facts.compressed import FP8, PATTERN
from auto_round.facts.tensor import TensorSpec, dtype_name
from auto_round.layouts.compressed import INTEGERS
from auto_round.layouts.compressed_float import FLOATS, FP8_DTYPES
from auto_round.layouts.layout import Layout
from auto_round.numerics.format import Format
from auto_round.numerics.group import Group
from auto_round.numerics.presets_float import fp8_format
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.stored.compressed_words import schemes_of
from auto_round.stored.packed import StoredWeight

_CODES = ("weight_packed", "weight")
_SHAPE, _ORDER = "weight_shape", "weight_g_idx"
_STEPS = "weight_scale"
_ZEROS = "weight_zero_point"

Args = Mapping[str, Any]
"""What a config group says of weights or of inputs."""


def read_compressed(config: Mapping[str, Any], files: Checkpoint) -> list[StoredWeight]:
    """Packed weights of a folder.

    Raises:
        ConfigError: a configuration without groups, or an expression that is not one.
        UnsupportedError: numbers or bytes that this version does not read; names the layers' format.
        CheckpointError: a packed layer that no group speaks of.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ConfigError(f"{files.folder}: its quantization_config has no config_groups")
    if config.get("sparsity_config"):
        raise UnsupportedError(
            f"{files.folder} cannot be read",
            [Refusal("compressed-tensors", "weights are stored sparse (sparsity_config)")],
        )
    finder = _Finder(list(groups.values()))
    return [_packed(layer, finder.group_of(layer), config, files) for layer in _layers(files)]


def _layers(files: Checkpoint) -> list[str]:
    """Names of the layers with packed tensors, in the order of their bytes."""
    found: dict[str, None] = {}
    for name in files.names:
        layer, _, suffix = name.rpartition(".")
        if suffix == _CODES[0] or (suffix == _STEPS and _is_packed(f"{layer}.weight", files)):
            found[layer] = None
    return list(found)


def _is_packed(name: str, files: Checkpoint) -> bool:
    """Whether a weight is stored as codes: folders may hold scales beside rounded weights of 16 bits."""
    return name in files and files.info(name).dtype in (torch.int8, *FP8_DTYPES.values())


class _Finder:
    """Config groups by the names that their targets meet."""

    def __init__(self, groups: Sequence[Args]) -> None:
        self._groups = groups
        self._targets = [[str(target) for target in group.get("targets") or ()] for group in groups]
        texts = {t.removeprefix(PATTERN) for ts in self._targets for t in ts if t.startswith(PATTERN)}
        try:
            self._compiled = {text: re.compile(text) for text in texts}
        except re.error as error:
            raise ConfigError(f"a target of config_groups is no regular expression: {error}") from error

    def group_of(self, layer: str) -> Args | None:
        """The group of a packed layer; a class of modules stands for every layer that nothing else names."""
        for meets in (self._names, self._finds, self._classes):
            for group, targets in zip(self._groups, self._targets, strict=True):
                if any(meets(target, layer) for target in targets):
                    return group
        return None

    def _names(self, target: str, layer: str) -> bool:
        return target == layer

    def _finds(self, target: str, layer: str) -> bool:
        found = self._compiled.get(target.removeprefix(PATTERN)) if target.startswith(PATTERN) else None
        return found is not None and found.match(layer) is not None

    def _classes(self, target: str, layer: str) -> bool:
        return target.isidentifier() and target[0].isupper()


def _packed(layer: str, group: Args | None, config: Mapping[str, Any], files: Checkpoint) -> StoredWeight:
    if group is None or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f'{files.folder}: layer "{layer}" is packed, but no config group is for it')
    stored = {
        name.rpartition(".")[2]: files.spec(name)
        for suffix in (*_CODES, _SHAPE, _STEPS, _ORDER, _ZEROS, "weight_global_scale")
        if (name := f"{layer}.{suffix}") in files
    }
    for scheme, fmt, layout in _candidates(group, stored[_STEPS].dtype):
        shape = _shape(layer, stored, fmt, files)
        parts = {suffix: f"{layer}.{suffix}" for suffix in layout.spec(fmt, shape)}
        order = f"{layer}.{_ORDER}" if _ORDER in stored else None
        found = StoredWeight(f"{layer}.weight", shape, fmt, layout, parts, order=order, scheme=scheme)
        if not found.mistake(files):
            return found
    weights = group["weights"]
    said = f"{group.get('format') or config.get('format')}: {_described(weights)}"
    lies = ", ".join(f"{suffix} {_shown(spec)}" for suffix, spec in stored.items())
    raise UnsupportedError(
        f'layer "{layer}" of {files.folder} cannot be read',
        [Refusal("compressed-tensors", f"{said}, stored as {lies}, is no form that is known here")],
    )


def _candidates(
    group: Args, steps: torch.dtype
) -> Iterator[tuple[QuantizationScheme | None, Format, Layout]]:
    """Formats that a group may mean, and the orders of bytes that may hold them; headers decide."""
    weights = group["weights"]
    for scheme in schemes_of(group, steps):
        fmt = scheme.weight_format()
        if fmt is not None:
            for layout in (*INTEGERS.values(), *FLOATS.values()):
                if layout.accepts(fmt, _whole(fmt)) is None:
                    yield scheme, fmt, layout
    block = weights.get("block_structure")
    if weights.get("strategy") == "block" and weights.get("type") == "float" and _is_block(block):
        yield None, fp8_format(Group(block[1], block[0]), scale_dtype=steps), FLOATS[FP8]


def _whole(fmt: Format) -> tuple[int, int]:
    """A shape of whole groups and words."""
    return fmt.group.rows, max(fmt.group.size, 1) * 256


def _is_block(said: Any) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)


def _shape(layer: str, stored: Mapping[str, TensorSpec], fmt: Format, files: Checkpoint) -> tuple[int, int]:
    """`(out, in)`: as stored, or from how many codes there are room for."""
    if _SHAPE in stored:
        n_out, n_in = files.read(f"{layer}.{_SHAPE}").tolist()
        return n_out, n_in
    codes = stored[_CODES[0]] if _CODES[0] in stored else stored[_CODES[1]]
    if len(codes.shape) != 2:
        raise CheckpointError(f'{files.folder}: layer "{layer}" has codes of shape {list(codes.shape)}')
    n_out, wide = codes.shape
    return n_out, wide if _CODES[0] not in stored else wide * 8 * codes.dtype.itemsize // fmt.grid.bits


def _described(weights: Args) -> str:
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric")
    return ", ".join(f"{key} {weights[key]}" for key in keys if weights.get(key) is not None)


def _shown(spec: TensorSpec) -> str:
    return f"{dtype_name(spec.dtype)} {list(spec.shape)}"
