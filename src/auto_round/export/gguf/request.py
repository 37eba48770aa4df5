"""What a user who wants a GGUF file said: formats, scheme and layer rules brought into line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_round.config.groups import SchemeOptions
from auto_round.config.options import Options
from auto_round.errors import ConfigError, MissingError
from auto_round.log import logger
from auto_round.schemes.gguf_types import (
    FILE_TYPES,
    FORMAT_PREFIX,
    SCHEME_PREFIX,
    TYPES,
    FileType,
    file_type,
)
from auto_round.schemes.scheme import QuantizationScheme, parse_scheme
from auto_round.tuning.settings import without_tuning

_OF_BITS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
"""Type for rules that name nothing but bits."""


def settle_gguf(options: Options, beside: Collection[str]) -> Options:
    """The options with scheme, formats and layer rules of the GGUF file that they ask for; else unchanged.

    The format names the mixture, and so does the scheme: whichever is given decides, both must agree. A
    scheme of packed formats has no effect beside a GGUF format, and a warning says so.

    Args:
        options: what the user asked for.
        beside: formats that take any plan.

    Raises:
        ConfigError: an unknown type, two mixtures, a scheme whose numbers no type holds, single fields that
            contradict a GGUF scheme, or options of GGUF files without one.
        MissingError: a file that the options name is not there.
    """
    formats = options.output.formats
    asked = [name for name in formats if name == "gguf" or name.startswith(FORMAT_PREFIX)]
    scheme = options.scheme.scheme
    by_scheme = isinstance(scheme, str) and scheme.strip().upper().startswith(SCHEME_PREFIX)
    if not asked and not (by_scheme and formats == ("auto_round",)):
        _refuse_gguf_options(options, beside, by_scheme=by_scheme)
        return options
    others = tuple(name for name in formats if name not in asked and asked)
    wanted = _wanted(asked, str(scheme) if by_scheme else None)
    if not asked and "format" in options.given:
        logger.warning("format %s holds no GGUF types: scheme %s makes a GGUF file", formats[0], scheme)
    plain = TYPES[wanted.base].preset is None
    if by_scheme:
        _refuse_fields(options, wanted)
    else:
        _say_what_decides(options, wanted)
    base = "BF16" if plain else wanted.preset
    said: dict[str, Any] = dict.fromkeys(options.scheme.overrides())  # the type says it, or decides
    rules = _rules(options.scheme.layer_config)
    changed = replace(options.scheme, scheme=base, layer_config=rules, **said)
    names = (f"{FORMAT_PREFIX}{wanted.name}", *others)
    output = replace(options.output, format=",".join(names))
    if options.calibration.imatrix is not None and options.tune.iters:
        raise ConfigError("imatrix steers rounding without tuning: give --iters 0 too, or leave it out")
    if options.calibration.imatrix is not None and options.tune.distill_steps:
        raise ConfigError(
            "imatrix takes the place of calibration data, and distill_steps needs data: leave one of them out"
        )
    if options.calibration.imatrix is not None and options.output.save_imatrix is not None:
        raise ConfigError("save_imatrix writes what a run measures, and with imatrix it measures nothing")
    tune = options.tune
    if plain:
        tune = without_tuning(tune)
    _refuse_absent(options)
    return replace(options, scheme=changed, output=output, tune=tune)


def _refuse_absent(options: Options) -> None:
    files = {"imatrix": options.calibration.imatrix, "gguf_template": options.output.gguf_template}
    for name, value in files.items():
        if value is not None and not Path(value).expanduser().is_file():
            raise MissingError(f"{name} {value}: no such file; relative paths begin at {Path.cwd()}")


def _refuse_gguf_options(options: Options, beside: Collection[str], *, by_scheme: bool) -> None:
    """Refuse options that mean something for GGUF files only."""
    others = [name for name in options.output.formats if name not in beside]
    if by_scheme and others:
        raise ConfigError(
            f"scheme {options.scheme.scheme} belongs to GGUF files: leave out the format {', '.join(others)}"
        )
    given = {
        "gguf_template": options.output.gguf_template,
        "imatrix": options.calibration.imatrix,
        "save_imatrix": options.output.save_imatrix,
        "mmproj": options.output.mmproj,
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} belongs to GGUF files: give a format such as --format gguf:q4_k_m, or leave it out"
            )


def _wanted(asked: list[str], scheme: str | None) -> FileType:
    named = asked[0] if asked and asked[0] != "gguf" else None
    if named is None and scheme is None:
        raise ConfigError('format "gguf" needs a type: for example --format gguf:q4_k_m')
    wanted = file_type(named or str(scheme))
    if named is not None and scheme is not None and file_type(scheme) != wanted:
        raise ConfigError(f"format {named} and scheme {scheme} ask for different mixtures: give one of them")
    return wanted


def _refuse_fields(options: Options, wanted: FileType) -> None:
    """Refuse single fields that say something else than the GGUF scheme beside them."""
    fields = _contradictions(options.scheme.overrides(), TYPES[wanted.base].scheme)
    if fields:
        raise ConfigError(
            f"{', '.join(fields)}: the type of each tensor follows from {wanted.preset}; give single layers "
            'other types with layer_config, for example {"v_proj": "GGUF:Q8_0"}'
        )


def _say_what_decides(options: Options, wanted: FileType) -> None:
    """A scheme of whole numbers gives way to the type, and a warning says to which; others are refused.

    Scripts name one scheme for all formats, so the widths and groups of whole numbers give way here. Rounded
    activations, other kinds of numbers, or weights that stay as they are, are wishes that no GGUF type
    fulfils, and are refused.
    """
    asked, kind = options.scheme, TYPES[wanted.base]
    if kind.preset is None and asked.scheme == "BF16" and not asked.overrides():
        return
    usual = asked.scheme == SchemeOptions().scheme and "scheme" not in options.given
    idle = ["scheme"] if not usual and _contradictions(_fields(asked.scheme), kind.scheme) else []
    idle += _contradictions(asked.overrides(), kind.scheme)
    if not idle:
        return
    meant, name = parse_scheme(asked.scheme, asked.overrides()), FORMAT_PREFIX + wanted.name
    if meant.act_quantized or not meant.quantized or not meant.data_type.startswith("int"):
        raise ConfigError(
            f"{', '.join(idle)}: no type of a GGUF file holds {meant.label}, {name} stores most matrices as "
            f"{kind.name.upper()}; leave {'it' if len(idle) == 1 else 'them'} out, or choose another format"
        )
    logger.warning(
        '%s: no effect (%s), since %s stores most matrices as %s, with %d bits; layer_config={"v_proj": '
        '"GGUF:Q8_0"} gives single layers another type',
        ", ".join(idle),
        meant.label,
        name,
        kind.name.upper(),
        kind.bits,
    )


def _fields(scheme: object) -> dict[str, Any]:
    """Fields that a scheme names, as it was given."""
    named = scheme if isinstance(scheme, Mapping) else parse_scheme(scheme)
    return {name: value for name, value in named.items() if value is not None}


def _contradictions(fields: Mapping[str, Any], scheme: QuantizationScheme | None) -> list[str]:
    """Single fields of a scheme that say something else than the type that most tensors get.

    `data_type="int"` agrees with every type of whole numbers, and `act_bits=16` (nothing rounded) with all.
    """
    if scheme is None:
        return sorted(fields)
    says = {name: [getattr(scheme, name, ...)] for name in fields} | {"act_bits": [scheme.act_bits, 16]}
    if scheme.data_type.startswith("int_"):
        says["data_type"] = [scheme.data_type, "int"]
    return sorted(name for name, value in fields.items() if value not in says[name])


def _rules(layer_config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Layer rules whose schemes are GGUF types; bits alone stand for the K-type of that width."""
    if layer_config is None:
        return None
    return {key: _rule(key, value) for key, value in layer_config.items()}


def _type_of_fields(fields: Mapping[str, Any]) -> str:
    """Type whose scheme says what the fields say, the K-type first; "" where none does."""
    if set(fields) == {"bits"} and fields["bits"] in (16, 32):
        return "BF16"
    fitting = [
        t.name for t in TYPES.values() if t.preset is not None and not _contradictions(fields, t.scheme)
    ]
    if "bits" not in fields or not fitting:
        return ""
    usual = _OF_BITS[fields["bits"]]
    return usual if usual in fitting else fitting[0]


def _rule(key: str, value: Any) -> Any:
    """One rule as the plan reads it: a preset with the numbers of a GGUF type, or `BF16` for kept layers."""
    if isinstance(value, QuantizationScheme):
        return value
    if isinstance(value, Mapping):
        name = _type_of_fields(value)
    else:
        name = str(value).strip().upper().removeprefix(SCHEME_PREFIX)
    if name in ("BF16", "F16", "FP16"):
        return "BF16"
    by_preset = {t.preset: t for t in TYPES.values() if t.preset is not None}
    kind = by_preset.get(SCHEME_PREFIX + name) or TYPES.get(name.casefold())
    if kind is not None and kind.preset is not None:
        return kind.preset
    what = "is a mixture of types" if name.casefold() in FILE_TYPES else "is no GGUF type"
    raise ConfigError(
        f'layer_config "{key}": {value!r} {what}; give one of '
        f"{', '.join(SCHEME_PREFIX + t.name.upper() for t in by_preset.values())}, or bits of "
        f"{', '.join(map(str, _OF_BITS))} or 16"
    )
