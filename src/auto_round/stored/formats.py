"""In which format each layer of a checkpoint is stored: the reading side of `quantization_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.layouts.by_numbers import ByNumbers
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import LAYOUTS, PACKING_FORMAT, layout_for, packing_format_of
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.grid_float import FloatGrid
from auto_round.numerics.presets import SCALE_DTYPES
from auto_round.schemes.number_types import NUMBER_TYPES, stored_type
from auto_round.schemes.scheme import FIELD_TYPES, QuantizationScheme
from auto_round.schemes.vocabulary import KEPT_BITS
from auto_round.stored.gptq_awq_config import (
    dynamic_rule,
    foreign_layout,
    foreign_method,
    foreign_top,
    is_listed,
)

_HEAD = "lm_head"
_BLOCK = re.compile(r"(.+?)\.\d+\.")
_E4M3 = "e4m3"
_FILLED = "model_free"
"""Mark of folders that auto-round 0.15 and later write without building the model: a short last group is
stored at full length."""
_BLOCK_KEYS = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
PATTERN_CHARACTERS = frozenset("*+?^$()[]{}|\\")
"""What makes a key of `extra_config` a pattern for Transformers, vLLM and SGLang; a dot alone does not."""

Finder = tuple[re.Pattern[str], Mapping[str, Any]]
"""What finds layers by their names, and their fields."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """How one quantized layer is stored.

    Attributes:
        format: numeric format of its weight.
        layout: order of the stored bytes.
        sym: its weight is stored without zero points of its own.
        inputs: what its input is rounded to; None where it is left alone.
        scheme: all of it in words, with the steps' dtype as the configuration says.
    """

    format: Format
    layout: Layout
    sym: bool
    inputs: InputFormat | None
    scheme: QuantizationScheme

    @property
    def held(self) -> torch.dtype | None:
        """Dtype to which floating weights are rounded before they are multiplied with rounded inputs.

        Readers of compressed-tensors folders do so, and then tuning does; None where nothing is rounded.
        """
        if self.inputs is None or not isinstance(self.format.grid, FloatGrid):
            return None
        return SCALE_DTYPES[self.scheme.scale_dtype] if NUMBER_TYPES[self.scheme.data_type].steps else None

    def tensors(self, shape: tuple[int, int]) -> LayerLayout:
        """How the layer lies on disk, whose weight has this shape."""
        return LayerLayout(self.layout, self.format, shape, self.inputs)


@dataclass(frozen=True, slots=True)
class StoredFormats:
    """What a `quantization_config` says of each layer.

    A layer's exact name in `extra_config` comes first, then whether it lies in a block, then expressions
    found in its name, then parts of it, then the fields at the top. An expression or part that finds no layer
    in the blocks speaks of layers outside of them (auto-round 0.16 `inference/utils.py`). GPTQ and AWQ
    checkpoints have their own lists.

    Attributes:
        top: fields of layers that nothing else names.
        extra: exact name or expression -> fields that differ.
        blocks: beginnings of the names of layers that are quantized unless `extra` names them.
        kept: parts of names of layers that are not quantized.
        layout: order of the stored bytes, of layers whose fields name no other.
        dynamic: GPTQModel's rules.
        listed: the only layers that are quantized, by the ends of their names; empty for all in blocks.
        head: the output head is quantized.
        reordered: the checkpoint says that inputs may be reordered by activation (`desc_act`).
        patterns: those keys of `extra` that are expressions, then those that are parts of names, compiled.
        outside: those of them that find no layer in the blocks.
    """

    top: Mapping[str, Any]
    extra: Mapping[str, Mapping[str, Any]]
    blocks: tuple[str, ...]
    kept: tuple[str, ...]
    layout: Layout
    dynamic: Mapping[str, Any] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    head: bool = False
    reordered: bool = False
    patterns: tuple[Finder, ...] = ()
    outside: tuple[Finder, ...] = ()

    @classmethod
    def of_folder(cls, config: Mapping[str, Any], layers: Iterable[str]) -> StoredFormats:
        """Read the configuration of a folder without its model.

        Args:
            config: `quantization_config` as it lies on disk.
            layers: names of its layers, which tell how its blocks are called.

        Raises:
            ConfigError, UnsupportedError: as `read`.
        """
        names = list(layers)
        found = (_BLOCK.match(name) for name in names)
        stored = cls.read(config, tuple(dict.fromkeys(match[1] for match in found if match)))
        return stored.among([(name,) for name in names])

    @classmethod
    def read(cls, config: Mapping[str, Any], default_blocks: Sequence[str]) -> StoredFormats:
        """Read a configuration.

        Args:
            config: `quantization_config` of `auto-round`, or of `gptq` or `awq` passed through
                `AutoRoundConfig`.
            default_blocks: beginnings of the blocks' names, for configurations that name none.

        Raises:
            ConfigError: an expression that is not one, or a field with an impossible value.
            UnsupportedError: byte orders that this version does not read.
        """
        if config.get("fmt", _E4M3) != _E4M3:
            raise UnsupportedError(
                f"this checkpoint holds FP8 numbers of the kind {config['fmt']}",
                [Refusal("auto_round", f"loads the kind {_E4M3}")],
            )
        foreign = foreign_method(config)
        if config.get("desc_act") and foreign is None:
            raise UnsupportedError(
                "this checkpoint's inputs are reordered by activation (desc_act)",
                [Refusal("auto_round", "desc_act true", "use a checkpoint with desc_act false")],
            )
        top = {field: config[field] for field in FIELD_TYPES if config.get(field) is not None}
        if foreign is not None:
            top |= foreign_top(config, foreign)
        blocks = next((found for key in _BLOCK_KEYS if (found := _names(config.get(key)))), ())
        extra = dict(config.get("extra_config") or {})
        compiled = {key: _compiled(key) for key in extra}
        patterns = ((compiled[key], extra[key]) for key in extra if _is_pattern(key))
        return cls(
            top,
            extra,
            blocks or tuple(default_blocks),
            _names(config.get("modules_to_not_convert")),
            _layout(config) if foreign is None else foreign_layout(config, foreign),
            config.get("dynamic") or {},
            _names(config.get("modules_in_block_to_quantize")),
            config.get("lm_head") is True,
            bool(config.get("desc_act")),
            tuple(patterns),
        )

    @property
    def exact(self) -> list[str]:
        """Keys of `extra` that may be names of layers."""
        return [key for key in self.extra if not _is_pattern(key)]

    def among(self, layers: Sequence[Sequence[str]]) -> StoredFormats:
        """The same, told which layers there are: a key that is no layer's name is a part of names.

        Args:
            layers: all names of each layer.
        """
        text = "\n".join(name for names in layers for name in names)
        known = {name for names in layers for name in names}
        parts = tuple(
            (finder, self.extra[key])
            for key in self.exact
            if self.extra[key] and key not in known and (finder := _compiled(key)).search(text)
        )
        finders = (*self.patterns, *parts)
        covered = [names for names in layers if self._covers(names)] if finders else []
        outside = (f for f in finders if f[1] and not any(_finds(f[0], names) for names in covered))
        return replace(self, patterns=finders, outside=tuple(outside))

    def layer(self, names: Sequence[str]) -> StoredLayer | None:
        """How one layer is stored; None when it is not quantized.

        Args:
            names: the layer's names, in the module tree and on disk.

        Raises:
            ConfigError: a field with an impossible value.
            UnsupportedError: a format or an order of bytes that this version does not read.
        """
        fields = self._fields(names)
        scheme = None if fields is None else _scheme(names[0], fields)
        fmt = None if scheme is None else scheme.weight_format()
        if fields is None or scheme is None or fmt is None:
            return None
        layout = _layout(fields) if PACKING_FORMAT in fields else self.layout
        held = layout.holds(fmt) if isinstance(layout, ByNumbers) else not isinstance(fmt.grid, FloatGrid)
        if not held:
            raise UnsupportedError(
                f'layer "{names[0]}" is stored as {scheme.data_type} of {scheme.bits} bits, which the '
                f"order of bytes {layout.name} does not hold",
                [
                    Refusal(
                        "auto_round", "packing_format and data_type contradict each other, or one is missing"
                    )
                ],
            )
        return StoredLayer(fmt, layout, scheme.sym, scheme.activation_format(), scheme)

    def _fields(self, names: Sequence[str]) -> dict[str, Any] | None:
        for name in names:
            if name in self.extra:
                return {**self.top, **self.extra[name]}
        if not self._covers(names):
            found = next((fields for finder, fields in self.outside if _finds(finder, names)), None)
            return None if found is None else {**self.top, **found}
        changes = [dynamic_rule(self.dynamic, name) for name in names]
        if None in changes:
            return None
        for finder, fields in self.patterns:
            if _finds(finder, names):
                return {**self.top, **fields}
        return {**self.top, **next((change for change in changes if change), {})}

    def _covers(self, names: Sequence[str]) -> bool:
        """Whether the fields at the top hold for a layer at all."""
        if self.head and any(name.rpartition(".")[2] == _HEAD for name in names):
            return True
        if not any(name.startswith(f"{block}.") for name in names for block in self.blocks):
            return False
        if self.listed and not any(is_listed(name, self.listed) for name in names):
            return False
        return not any(part in name for name in names for part in self.kept)


def _is_pattern(key: str) -> bool:
    return bool(PATTERN_CHARACTERS.intersection(key))


def _finds(finder: re.Pattern[str], names: Sequence[str]) -> bool:
    return any(finder.search(name) for name in names)


def _names(value: Any) -> tuple[str, ...]:
    """Block names of a comma list, a list, or a list of lists."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(name for item in value for name in _names(item))


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise ConfigError(
            f'extra_config of this checkpoint has the key "{key}", expected a layer name or a regular '
            f"expression ({error})"
        ) from error


def _layout(config: Mapping[str, Any]) -> Layout:
    packing = packing_format_of(config)
    if packing in LAYOUTS:
        layout = layout_for(packing)
        if config.get(_FILLED) and isinstance(layout, GPTQ):
            return replace(layout, filled=True)
        return layout
    raise UnsupportedError(
        f'weights packed as "{packing}" cannot be loaded',
        [Refusal(packing, "not in this version yet", "loadable are " + ", ".join(LAYOUTS))],
    )


def _scheme(name: str, fields: Mapping[str, Any]) -> QuantizationScheme | None:
    """Scheme of a layer with these fields; None when it is not quantized."""
    bits = fields.get("bits", 4)
    if not isinstance(bits, int):
        raise ConfigError(f'bits of layer "{name}" must be a whole number, got {bits!r}')
    if bits >= KEPT_BITS:
        return None
    word = str(fields.get("data_type", "int"))
    data_type = stored_type(word)
    if data_type is None or bits not in NUMBER_TYPES[data_type].bits:
        held = " and ".join(row.called for row in NUMBER_TYPES.values() if row.stored)
        raise UnsupportedError(
            f'layer "{name}" is stored as {word} of {bits} bits',
            [Refusal("auto_round", f"loads {held} in this version")],
        )
    size = fields.get("group_size", 128)
    if not isinstance(size, int):
        raise UnsupportedError(
            f'layer "{name}" has group_size {size!r}', [Refusal("auto_round", "loads groups along the input")]
        )
    usual = NUMBER_TYPES[data_type].steps or QuantizationScheme().scale_dtype
    scale = str(fields.get("scale_dtype", usual)).removeprefix("torch.")
    if scale not in SCALE_DTYPES:
        raise ConfigError(f'scale_dtype of layer "{name}" is {scale}, expected one of {list(SCALE_DTYPES)}')
    inputs = _inputs(name, fields, word)
    return QuantizationScheme(
        bits, size, bool(fields.get("sym", True)), data_type, scale_dtype=scale, **inputs
    )


def _inputs(name: str, fields: Mapping[str, Any], word: str) -> dict[str, Any]:
    """Fields of a layer's inputs; none where they are left alone. `word` is the `data_type` of its weight."""
    if (fields.get("act_bits") or KEPT_BITS) >= KEPT_BITS:
        return {}
    data_type = stored_type(str(fields.get("act_data_type", word)))
    if data_type is None or not NUMBER_TYPES[data_type].runs_inputs:
        raise UnsupportedError(
            f'layer "{name}" wants activations of {fields["act_bits"]} bits',
            [Refusal("auto_round", f"does not run {fields.get('act_data_type', word)} in this version")],
        )
    named = {
        key: fields[key] for key in FIELD_TYPES if key.startswith("act_") and fields.get(key) is not None
    }
    return {**named, "act_data_type": data_type}
