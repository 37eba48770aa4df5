"""The `quantization_config` of the `llm_compressor` format, as compressed-tensors, vLLM and SGLang read it.

A config group holds the settings of its layers (bits, group size and so on), and `targets`, which name them:
exact names count first, then expressions (`re:...`, matched at the beginning of a name), then names of
classes. `ignore` has entries of the same kinds and overrules all groups. Transformers takes the settings of
experts from the first group, so theirs comes first. vLLM asks about the parts of a matrix that it fuses
(q/k/v, gate/up) by their own names, and refuses different answers.

Source: compressed-tensors 0.20 `quantization/quant_config.py`, `quant_args.py`, `utils/match.py`; vLLM
`quantization/compressed_tensors/utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from auto_round.errors import InternalError, Refusal
from auto_round.export.compressed_cache import cache_scheme
from auto_round.export.reader_names import module_names
from auto_round.facts.compressed import COMPRESSED_TENSORS, MIXED, PATTERN
from auto_round.facts.layer import Layer, Role
from auto_round.layouts.compressed import INT_QUANTIZED, LAYOUT_VERSION
from auto_round.layouts.compressed_table import COMPRESSED
from auto_round.layouts.layout import Layout
from auto_round.numerics.activation_float import CalibratedScale
from auto_round.schemes.attention import AttentionPlan
from auto_round.schemes.number_types import INT, NUMBER_TYPES
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.type_columns import CompressedWords, InputFields
from auto_round.version import __version__

_CLASS = "Linear"
"""Target of every matrix, in Transformers and in vLLM."""

_SEVERAL = 2
"""Names that one expression has to stand for to be written instead of them."""


def refuse_numbers(who: str, scheme: QuantizationScheme) -> Refusal | None:
    """Why compressed-tensors cannot describe a scheme's weights or inputs; None where it can."""
    named = [("weights", scheme.data_type)]
    if scheme.inputs is not None:
        named.append(("activations", scheme.inputs.data_type))
    for what, data_type in named:
        row = NUMBER_TYPES.get(data_type)
        if row is None or row.compressed is None:
            return Refusal(who, f'compressed-tensors has no {what} of data_type "{data_type}"', "use fake")
    return None


def compressed_layout(scheme: QuantizationScheme) -> Layout:
    """Order of bytes of a layer."""
    return COMPRESSED[_words(scheme.data_type).format(scheme)]


def _words(data_type: str) -> CompressedWords:
    words = NUMBER_TYPES[data_type].compressed
    if words is None:
        raise InternalError(f"compressed-tensors has no words for {data_type}")
    return words


def compressed_config(
    plan: Plan, layers: Sequence[Layer], caches: AttentionPlan | None = None
) -> dict[str, Any] | None:
    """Dictionary for `config.json` and `quantization_config.json`; None when nothing is quantized.

    Args:
        plan: what becomes of each layer.
        layers: the layers of the plan.
        caches: which scales of attention lie in the folder; None for none.
    """
    members: dict[tuple[object, ...], list[Layer]] = {}
    described: dict[tuple[object, ...], dict[str, Any]] = {}
    for layer in sorted(layers, key=lambda layer: not is_joined(layer)):
        scheme = plan.scheme_of(layer.name)
        if scheme is not None:
            key = group_of(scheme)
            members.setdefault(key, []).append(layer)
            described.setdefault(key, _group(scheme))
    if not members:
        return None
    groups = {
        f"group_{i}": {"targets": _targets(members[key], alone=len(members) == 1), **described[key]}
        for i, key in enumerate(members)
    }
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    config: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(plan, layers),
        "kv_cache_scheme": None if caches is None else cache_scheme(caches),
        "version": LAYOUT_VERSION,
        "provider": "auto-round",
        "autoround_version": __version__,
    }
    if _unpacked_on_loading(list(groups.values())):
        config["dequantize"] = True
    return config


def is_joined(layer: Layer) -> bool:
    """Whether Transformers joins a layer's weight with others while it loads them: it stacks experts."""
    return layer.expert is not None or layer.rows is not None or layer.role is Role.EXPERT


def _unpacked_on_loading(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the configuration tells Transformers to unpack weights while it loads them.

    That works for one config group only. Otherwise Transformers unpacks weights in the first call, and until
    then layers have no `weight`: models whose code reads it do not load, and adapters find none. Zero points
    are never unpacked later (5.23 makes no room for packed ones). Where activations are rounded too, weights
    are not unpacked, since activations would no longer be rounded then.
    """
    alone = len(groups) == 1 and groups[0]["input_activations"] is None
    return alone or not all(group["weights"]["symmetric"] for group in groups)


def group_of(scheme: QuantizationScheme) -> tuple[object, ...]:
    """Key of a layer's config group: equal keys, one group. The scale's dtype is no part of it."""
    return (scheme.data_type, scheme.bits, scheme.group_size, scheme.sym, scheme.inputs)


_STRATEGIES = {-1: "channel", 0: "tensor"}
"""`strategy` of weights by group size; that of their type for all others."""

_INPUT_STRATEGIES = {-1: "token", 0: "tensor"}
"""`strategy` of inputs by group size; `group` for all others."""


def _group(scheme: QuantizationScheme) -> dict[str, Any]:
    """A config group without its targets."""
    words = _words(scheme.data_type)
    weights = {
        "num_bits": scheme.bits,
        "type": words.type,
        "symmetric": scheme.sym,
        "strategy": _STRATEGIES.get(scheme.group_size, words.strategy),
        "group_size": scheme.group_size if scheme.group_size > 0 and words.block is None else None,
        "dynamic": False,
        "actorder": None,
        **_more(words),
    }
    return {
        "weights": weights,
        "input_activations": None if scheme.inputs is None else _inputs(scheme, scheme.inputs),
        "output_activations": None,
        "format": compressed_layout(scheme).name,
    }


def _more(words: CompressedWords) -> dict[str, Any]:
    """Fields that only some number types have."""
    found: dict[str, Any] = {}
    if words.block is not None:
        found["block_structure"] = list(words.block)
    if words.scale_dtype is not None:
        found["scale_dtype"] = words.scale_dtype
    return found


_LOCAL = "local"
"""`dynamic` where groups are measured as the model runs, over a number that calibration fixed."""


def _dynamic(scheme: QuantizationScheme) -> bool | str:
    fmt = scheme.activation_format()
    if not isinstance(fmt, CalibratedScale):
        return True
    return False if fmt.format.group.size == 0 else _LOCAL


def _inputs(scheme: QuantizationScheme, fields: InputFields) -> dict[str, Any]:
    words = _words(fields.data_type)
    return {
        "num_bits": fields.bits,
        "type": words.type,
        "symmetric": fields.sym,
        "strategy": _INPUT_STRATEGIES.get(fields.group_size, words.strategy),
        "group_size": fields.group_size if fields.group_size > 0 else None,
        "dynamic": _dynamic(scheme),
        **_more(words),
    }


def _targets(members: Sequence[Layer], *, alone: bool) -> list[str]:
    """Every matrix where there is one group, else the layers by name.

    vLLM's class of the head is not `Linear`, so the head is always named.
    """
    if alone:
        return [*(layer.name for layer in members if layer.role is Role.HEAD), _CLASS]
    return list(dict.fromkeys(name for layer in members for name in module_names(layer)))


def _ignored(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """Kept layers; several names that differ only in numbers become one expression, where that is safe."""
    quantized = [n for layer in layers if plan.scheme_of(layer.name) is not None for n in module_names(layer)]
    alike: dict[str, list[str]] = {}
    for layer in layers:
        if plan.scheme_of(layer.name) is None:
            for name in module_names(layer):
                alike.setdefault(_pattern(name), []).append(name)
    found: list[str] = []
    for pattern, names in alike.items():
        several = len(names) >= _SEVERAL and not any(re.match(pattern, name) for name in quantized)
        found += [f"{PATTERN}{pattern}"] if several else names
    return list(dict.fromkeys(found))


def _pattern(name: str) -> str:
    """Expression for a name and all that differ from it in numbers only.

    The prefix before the list of blocks is left open, since vLLM gives some models other prefixes.
    """
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    tail = [r"\d+" if part.isdigit() else re.escape(part) for part in parts[max(0, first - 1) :]]
    return (r".*\." if first > 1 else "") + r"\.".join(tail) + "$"


def loader_notes(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """What some loaders of such a folder cannot do with a plan, for people.

    Source: `WNA16_SUPPORTED_TYPES_MAP` in `compressed_tensors_wNa16.py` of vLLM 0.32 and of SGLang 0.5.23,
    `_get_scheme_from_parts` of both.
    """
    schemes = {s for layer in layers if (s := plan.scheme_of(layer.name)) is not None}
    return sorted({note for scheme in schemes if (note := _note(scheme))})


_COMMON_BITS = {True: (4, 8), False: (4,)}
"""Widths of weights that every loader reads, without and with zero points."""


def _note(scheme: QuantizationScheme) -> str:
    if scheme.data_type != INT:
        return ""
    if scheme.inputs is None:
        common = _COMMON_BITS[scheme.sym]
        if scheme.bits in common:
            return ""
        kind = "symmetric" if scheme.sym else "asymmetric"
        return (
            f"llm_compressor: {kind} weights of {scheme.bits} bits need compressed-tensors and vLLM of the "
            f"middle of 2026 or later; SGLang reads {' and '.join(map(str, common))} bits"
        )
    if compressed_layout(scheme) is INT_QUANTIZED:
        return ""
    if not scheme.inputs.sym:
        return (
            f"llm_compressor: {scheme.label} runs in Transformers with compressed-tensors only; vLLM wants "
            "symmetric activations"
        )
    return (
        f"llm_compressor: {scheme.label} runs in Transformers with compressed-tensors and in vLLM 0.32 or "
        "later, where Marlin leaves activations in 16 bits; SGLang does not read it"
    )
