"""The `quantization_config` of the `auto_round` format, as Transformers, vLLM and SGLang read it.

How all three find the settings of a layer: its exact name in `extra_config` first, then expressions that find
it (Transformers and vLLM by `re.search`, SGLang by `re.fullmatch`), then the fields at the top. Layers whose
names do not begin with `block_name_to_quantize` are left alone, except those that `extra_config` names. Where
no block holds a quantized layer (a head alone) there is nothing to say there, and readers take every layer
for a quantized one: then each kept layer has an entry.

vLLM reads an exact entry without `bits` as 16 bits, so every entry has `bits`. It asks for the module of all
experts of a block, not for single experts, so that module gets an entry too.

An entry may have a `packing_format` of its own, which this package alone reads: floating numbers lie in other
orders of bytes than whole ones.

Source: Transformers 5 `AutoRoundConfig`; vLLM 0.32 `quantization/inc/inc.py`, `inc/config_parser.py`; SGLang
`quantization/auto_round.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from auto_round.errors import InternalError
from auto_round.export.exporter import TuningFacts
from auto_round.export.packed import top_scheme
from auto_round.export.reader_names import EXPERTS, merged_names
from auto_round.facts.layer import Block, Layer
from auto_round.layouts.awq import AWQ
from auto_round.layouts.table import FP8, PACKING_FORMAT, layout_for
from auto_round.schemes.number_types import steps_of, stored_word
from auto_round.schemes.plan import Plan
from auto_round.schemes.rules import Kind
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.vocabulary import KEPT_BITS
from auto_round.version import __version__

KEPT: Mapping[str, Any] = {"bits": KEPT_BITS, "data_type": "float"}
"""Entry of a layer inside the blocks that keeps its weights."""

KEPT_INPUTS: Mapping[str, Any] = {"act_bits": KEPT_BITS, "act_data_type": "float"}
"""What a layer's entry says of inputs that are left alone, where the top rounds inputs."""

DEFAULT_FACTS: Mapping[str, Any] = {
    "amp": True,
    "batch_size": 8,
    "enable_minmax_tuning": True,
    "enable_norm_bias_tuning": False,
    "enable_quanted_input": True,
    "gradient_accumulate_steps": 1,
    "iters": 200,
    "low_gpu_mem_usage": False,
    "nsamples": 128,
    "seqlen": 2048,
}
"""Options that are written only when they differ from these."""

_RATES = ("lr", "minmax_lr")

FieldsOf = Callable[[QuantizationScheme], dict[str, Any]]

Override = tuple[tuple[str, Any], ...]
"""Fields of an `extra_config` entry, hashable."""


def auto_round_config(
    packing_format: str,
    plan: Plan,
    layers: Sequence[Layer],
    blocks: Sequence[Block],
    facts: TuningFacts | None = None,
    others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any] | None:
    """Dictionary for `config.json` and `quantization_config.json`; None when nothing is quantized.

    Args:
        packing_format: order of the stored bytes, of layers with the scheme at the top and all alike.
        plan: what becomes of each layer.
        layers: the layers of the plan.
        blocks: the blocks of the model.
        facts: options of the tuning run; those that say nothing new are left out.
        others: layer -> order of its bytes, where that is another one.

    Raises:
        InternalError: a fact that would overwrite another key.
    """
    if not plan.quantized:
        return None
    fields_of = _with_zero_points if isinstance(layout_for(packing_format), AWQ) else scheme_fields
    base = _loadable(fields_of(top_scheme(plan, layers, fields_of)))
    prefixes = _prefixes(plan, layers, blocks)
    config: dict[str, Any] = {
        "quant_method": "auto-round",
        PACKING_FORMAT: packing_format,
        **base,
        **(_fp8_words(base) if layout_for(packing_format) is FP8 else {}),
        "autoround_version": __version__,
    }
    if prefixes:
        config["block_name_to_quantize"] = prefixes[0] if len(prefixes) == 1 else prefixes
    overrides = {
        layer.name: _override(plan, layer, base, prefixes, fields_of)
        + (((PACKING_FORMAT, others[layer.name]),) if layer.name in others else ())
        for layer in layers
    }
    extra = _extra_config(plan, overrides)
    if extra:
        config["extra_config"] = extra
    news = _news(facts or {})
    clash = sorted(set(news) & {*config, "extra_config", "scale_dtype"})
    if clash:
        raise InternalError(f"tuning facts would overwrite {clash} of the quantization_config")
    return config | news


def scheme_fields(scheme: QuantizationScheme) -> dict[str, Any]:
    """What readers need of a scheme; the dtype of steps only where it is not the usual one of the type."""
    fields: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "data_type": stored_word(scheme.data_type),
    }
    if (usual := steps_of(scheme.data_type)) and scheme.scale_dtype != usual:
        fields["scale_dtype"] = f"torch.{scheme.scale_dtype}"
    inputs = scheme.inputs
    if inputs is not None:
        fields |= {
            "act_bits": inputs.bits,
            "act_group_size": inputs.group_size,
            "act_sym": inputs.sym,
            "act_data_type": stored_word(inputs.data_type),
            "act_dynamic": inputs.dynamic,
        }
    return fields


def _loadable(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields for the top: Transformers does not load a configuration that says `group_size` 0 there.

    So the layers say it themselves. Source: `AutoRoundConfig.post_init` in Transformers 5.24.
    """
    return {**fields, "group_size": -1} if fields["group_size"] == 0 else fields


def _fp8_words(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What FP8 folders of auto-round 0.16 say besides."""
    fixed = "act_bits" in fields and not fields["act_dynamic"]
    return {"fmt": "e4m3", "activation_scheme": "static" if fixed else "dynamic"}


def _with_zero_points(scheme: QuantizationScheme) -> dict[str, Any]:
    """Fields for the AWQ order of bytes, which stores zero points; `sym` true would keep vLLM from Marlin."""
    return {**scheme_fields(scheme), "sym": False}


def _prefixes(plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block]) -> list[str]:
    """Common beginnings of the blocks that hold quantized layers, for example `model.layers`."""
    quantized = {layer.block for layer in layers if plan.scheme_of(layer.name) is not None}
    disks = [block.disk for block in blocks if block.index in quantized]
    return list(dict.fromkeys(re.sub(r"\.\d+$", "", disk) for disk in disks))


def _extra_config(plan: Plan, overrides: Mapping[str, Override]) -> dict[str, dict[str, Any]]:
    """Entries of layers that differ from the top, and the user's patterns where all readers agree.

    Names come before patterns in every reader, and serve tools that know no expressions.
    """
    experts = {
        name: overrides[part] for name, part in merged_names(overrides).items() if name.endswith(EXPERTS)
    }
    named = {name: dict(o) for name, o in {**experts, **overrides}.items() if o}
    return named | {regex: dict(overrides[names[0]]) for regex, names in _patterns(plan, overrides)}


def _override(
    plan: Plan, layer: Layer, base: Mapping[str, Any], prefixes: Sequence[str], fields_of: FieldsOf
) -> Override:
    """Entry of one layer; empty when the fields at the top say it all."""
    scheme = plan.scheme_of(layer.name)
    inside = any(layer.name.startswith(f"{p}.") for p in prefixes)
    unrounded = KEPT_INPUTS if "act_bits" in base else {}
    if scheme is None:
        return (*KEPT.items(), *unrounded.items()) if inside or not prefixes else ()
    known = base if inside else {}
    fields = fields_of(scheme)
    if scheme.inputs is None:
        fields |= unrounded
    if "scale_dtype" in known:
        fields.setdefault("scale_dtype", f"torch.{steps_of(scheme.data_type) or scheme.scale_dtype}")
    differing = {k: v for k, v in fields.items() if known.get(k) != v}
    return tuple(({"bits": scheme.bits} | differing).items()) if differing else ()


def _patterns(plan: Plan, overrides: Mapping[str, Override]) -> Iterator[tuple[str, list[str]]]:
    """Patterns of the user whose layers all have one and the same entry, with these layers."""
    for rule in plan.rules:
        if rule.kind is Kind.EXACT:
            continue
        for regex in (f".*{re.escape(rule.key)}.*", rule.regex):
            names = [name for name in overrides if re.search(regex, name)]
            alike = {overrides[name] for name in names}
            if len(alike) == 1 and all(alike) and all(re.fullmatch(regex, name) for name in names):
                yield regex, names
                break


def _news(facts: TuningFacts) -> dict[str, Any]:
    """Facts that differ from the defaults; a learning rate of 1/iters is the default too."""
    iters = facts.get("iters", DEFAULT_FACTS["iters"])
    usual = 1 / iters if isinstance(iters, (int, float)) and iters > 0 else None
    kept = {
        k: v for k, v in facts.items() if v is not None and (k not in DEFAULT_FACTS or DEFAULT_FACTS[k] != v)
    }
    for rate in _RATES:
        if rate in kept and kept[rate] in (usual, facts.get("lr") if rate == "minmax_lr" else usual):
            del kept[rate]
    return dict(sorted(kept.items()))
