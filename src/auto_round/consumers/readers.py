"""How engines read the configurations of `auto-round`, `gptq` and `awq` for one module: the rules, replayed.

Every engine has its own idea of how a pattern meets a name. All of them ask for the modules that they have
built, so a rule for `q_proj` does not reach a module called `qkv_proj` unless the engine asks for the parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.consumers.fields import FLOAT_BITS, CannotReadError, Fields, agreed, make_fields
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module
from auto_round.errors import ConfigError
from auto_round.stored.formats import PATTERN_CHARACTERS
from auto_round.stored.gptq_awq_config import dynamic_rule
from auto_round.stored.matrices import PLAIN

Match = Callable[[str, str], object]
"""`re.search`, `re.fullmatch`: does a pattern meet a name."""


@dataclass(frozen=True, slots=True)
class AutoRoundReader:
    """`extra_config` by exact name, then blocks by the beginnings of names, then `extra_config` by pattern.

    Source: vLLM `vllm/model_executor/layers/quantization/inc/config_parser.py`, `inc.py` (`re.search`);
    SGLang `python/sglang/srt/layers/quantization/auto_round.py` (`re.fullmatch`).

    Attributes:
        match: how a pattern meets a name.
        ends: vLLM: a key also meets names that end with it, an exact entry without `bits` means 16 bits, the
            parts of a fused module are asked for only where one of them has an entry, single experts never
            (`"fusedmoe" in layer.__class__.__name__.lower()` is not true of `RoutedExperts`).
    """

    match: Match
    ends: bool

    def __call__(self, folder: Folder, module: Module) -> Fields | None:
        """Scheme of a module; None where it is not quantized."""
        extra = _mapping(folder.quantization.get("extra_config"))
        if self.ends and any(_keeps(extra, name) for name in (module.name, f"model.{module.name}")):
            return None
        if module.name in extra:
            return self._fields(folder, module.name, inside=True)
        if self.ends and (end := next((key for key in extra if module.name.endswith(f".{key}")), None)):
            return self._fields(folder, end, inside=True)
        inside = _inside(folder, module)
        if module.experts and not self.ends:
            named = [name for name in extra if name.startswith(module.name)]
            if named:
                return self._common(folder, module, named, inside)
        elif len(module.parts) > 1 and not module.experts and self._asks_parts(extra, module):
            return self._common(folder, module, [part.name for part in module.parts], inside)
        return self._fields(folder, module.name, inside)

    def _common(self, folder: Folder, module: Module, names: Sequence[str], inside: bool) -> Fields | None:
        """The one scheme of several names. Engines compare all fields, of layers in 16 bits too."""
        found = agreed(module, {name: self._fields(folder, name, inside) for name in names})
        values = [self._values(folder, name, inside) for name in names]
        if any(value != values[0] for value in values):
            raise CannotReadError(
                f"it fuses {module.name} and needs one group_size and sym for its parts, even in 16 bits"
            )
        return found

    def _asks_parts(self, extra: Mapping[str, Any], module: Module) -> bool:
        if not self.ends:
            return bool(extra)
        return any(part.name in extra or self._pattern(extra, part.name) is not None for part in module.parts)

    def _pattern(self, extra: Mapping[str, Any], name: str) -> str | None:
        return next((key for key in extra if self._meets(key, name)), None)

    def _fields(self, folder: Folder, name: str, inside: bool) -> Fields | None:
        values = self._values(folder, name, inside)
        kept = isinstance(values["bits"], int) and values["bits"] >= FLOAT_BITS
        return None if kept else make_fields(**values, where=name)

    def _values(self, folder: Folder, name: str, inside: bool) -> dict[str, Any]:
        config = folder.quantization
        extra = _mapping(config.get("extra_config"))
        found = name if name in extra else self._pattern(extra, name)
        own: Mapping[str, Any] = {} if found is None else _mapping(extra[found])
        values: dict[str, Any] = {"bits": FLOAT_BITS, "group_size": -1, "sym": True}
        if inside:
            values = {key: config.get(key, True if key == "sym" else None) for key in values}
        return values | {key: own[key] for key in values if key in own}

    def _meets(self, key: str, name: str) -> bool:
        try:
            return not PATTERN_CHARACTERS.isdisjoint(key) and bool(self.match(key, name))
        except re.error:  # engines pass over these
            return False


def _keeps(extra: Mapping[str, Any], name: str) -> bool:
    """Whether vLLM takes an exact entry for 16 bits: also where it says nothing of bits."""
    if name not in extra:
        return False
    bits = _mapping(extra[name]).get("bits", FLOAT_BITS)
    return isinstance(bits, int) and bits >= FLOAT_BITS


def _inside(folder: Folder, module: Module) -> bool:
    """Whether the fields at the top hold for a module; prefixes are compared as they are written."""
    config = folder.quantization
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    if not blocks:
        return not module.head
    prefixes = blocks.split(",") if isinstance(blocks, str) else blocks
    return any(module.name.startswith(str(prefix)) for prefix in prefixes)


@dataclass(frozen=True, slots=True)
class GPTQReader:
    """`dynamic` for the module's own name, the head by `lm_head`.

    Source: vLLM `vllm/model_executor/layers/quantization/utils/gptq_utils.py` and `auto_gptq.py`; SGLang
    `python/sglang/srt/layers/quantization/utils.py`; GPTQModel `gptqmodel/utils/model.py`.

    Attributes:
        lists: layers that `modules_in_block_to_quantize` does not name are kept; without that key, those that
            are not packed on disk.
    """

    lists: bool

    def __call__(self, folder: Folder, module: Module) -> Fields | None:
        """Scheme of a module; None where it is not quantized."""
        config = folder.quantization
        if module.head and not config.get("lm_head"):
            return None
        if self.lists and not module.experts and not self._listed(folder, module):
            return None
        return scheme_by_dynamic(folder, module)

    def _listed(self, folder: Folder, module: Module) -> bool:
        names = _flat(folder.quantization.get("modules_in_block_to_quantize"))
        names = names or tuple(matrix.name for matrix in folder.packed)
        found = {part.name: any(name in part.name for name in names) for part in module.parts}
        if len(set(found.values())) > 1:
            raise CannotReadError(f"it fuses {module.name}, of which only some parts are quantized")
        return any(found.values())


def scheme_by_dynamic(folder: Folder, module: Module) -> Fields | None:
    """Fields at the top with what `dynamic` changes for a module; None for one that it keeps."""
    changes = _changes(folder, module)
    if changes is None:
        return None
    config = folder.quantization
    values = {key: changes.get(key, config.get(key)) for key in ("bits", "group_size", "sym")}
    return make_fields(**values, where=module.name)


def read_awq_dynamic(folder: Folder, module: Module) -> Fields | None:
    """AWQ folders in GPTQModel, which goes by `dynamic` and passes over `modules_to_not_convert`.

    Source: GPTQModel `gptqmodel/models/loader.py`.
    """
    config = folder.quantization
    if (module.head and not config.get("lm_head")) or _changes(folder, module) is None:
        return None
    return _awq_fields(folder, module)


@dataclass(frozen=True, slots=True)
class AWQReader:
    """`modules_to_not_convert` by substring, the head by `lm_head`.

    Source: vLLM `vllm/model_executor/layers/quantization/auto_awq.py` (`is_layer_skipped`, asks for the parts
    of fused modules; without the key, what is not packed on disk is kept); SGLang
    `python/sglang/srt/layers/quantization/awq/awq.py` (asks for the fused module).

    Attributes:
        parts: asks for the parts of a fused module, and looks on disk where the key is missing.
    """

    parts: bool

    def __call__(self, folder: Folder, module: Module) -> Fields | None:
        """Scheme of a module; None where it is not quantized."""
        config = folder.quantization
        if module.head and not config.get("lm_head"):
            return None
        kept = _flat(config.get("modules_to_not_convert"))
        if self.parts and not kept:
            kept = tuple(matrix.name for matrix in folder.matrices if matrix.order == PLAIN)
        whole = not self.parts or module.experts or any(part in module.name for part in kept)
        names = [module.name] if whole else [p.name for p in module.parts]
        skipped = {name: any(part in name for part in kept) for name in names}
        if len(set(skipped.values())) > 1:
            raise CannotReadError(f"it fuses {module.name}, of which only some parts are quantized")
        if any(skipped.values()):
            return None
        return _awq_fields(folder, module)


def _awq_fields(folder: Folder, module: Module) -> Fields:
    config = folder.quantization
    bits = config.get("bits", config.get("w_bit"))
    size = config.get("group_size", config.get("q_group_size"))
    return make_fields(bits, size, not config.get("zero_point"), module.name)


def _changes(folder: Folder, module: Module) -> Mapping[str, Any] | None:
    """What `dynamic` says of a module."""
    try:
        return dynamic_rule(_mapping(folder.quantization.get("dynamic")), module.name)
    except ConfigError as error:
        raise CannotReadError(str(error)) from error


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _flat(value: Any) -> tuple[str, ...]:
    """Names of a list, or of a list of lists."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        return ()
    names: list[str] = []
    for item in value if isinstance(value, Sequence) else ():
        names.extend(_flat(item))
    return tuple(names)
