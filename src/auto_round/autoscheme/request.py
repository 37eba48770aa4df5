"""What the user asked of AutoScheme: the schemes to choose from, and the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from auto_round.autoscheme.plan_file import written
from auto_round.config.options import Options
from auto_round.errors import ConfigError
from auto_round.export.table import plans_alone
from auto_round.log import logger
from auto_round.schemes.gguf_types import FORMAT_PREFIX, SCHEME_PREFIX, TYPES, file_type
from auto_round.schemes.scheme import parse_scheme


@dataclass(frozen=True, slots=True)
class Option:
    """One scheme to choose from.

    Attributes:
        label: for people, and the name of the option in files.
        scheme: as `SchemeOptions.scheme` takes it.
    """

    label: str
    scheme: str | Mapping[str, Any]


def read_options(options: Options) -> tuple[Option, ...]:
    """The schemes to choose from, each once.

    Raises:
        ConfigError: an unknown scheme, GGUF types beside others, formats that share no plan, or single fields
            that would make all options alike.
    """
    alike = [name for name in ("bits", "data_type") if name in options.scheme.overrides()]
    if alike:
        raise ConfigError(f"{', '.join(alike)}: the options of AutoScheme differ in it; leave it out")
    if "scheme" in options.given:
        logger.warning("scheme has no effect: AutoScheme chooses among %s", options.auto.scheme_options)
    found: dict[Any, Option] = {}
    for value in options.auto.scheme_options:
        given = _pure_type(value) if isinstance(value, str) else value
        scheme = parse_scheme(given, options.scheme.overrides())
        name = written(scheme if scheme.quantized else None)
        label = given.upper() if isinstance(given, str) else name if isinstance(name, str) else scheme.label
        found.setdefault(scheme, Option(label, given))
    listed = tuple(found.values())
    if all(not parse_scheme(option.scheme).quantized for option in listed):
        raise ConfigError("options must hold a scheme of fewer than 16 bits, for example W4A16")
    _refuse_two_kinds(listed, options.output.formats)
    return listed


def gguf_base(options: Options, first: str) -> str:
    """Scheme of a run whose layers are GGUF types: that of the format where it names one, else the given."""
    named = [name for name in options.output.formats if name.startswith(FORMAT_PREFIX)]
    return file_type(named[0]).preset if named else first


def is_gguf(option: Option) -> bool:
    """Whether an option is a type of GGUF files."""
    return isinstance(option.scheme, str) and option.scheme.startswith(SCHEME_PREFIX)


def _pure_type(name: str) -> str:
    """A mixture of GGUF types stands for the type of most of its tensors; other names stay."""
    if not name.strip().upper().startswith(SCHEME_PREFIX):
        return name
    return TYPES[file_type(name).base].preset or "BF16"


def _refuse_two_kinds(listed: Sequence[Option], formats: Sequence[str]) -> None:
    types = [option.label for option in listed if is_gguf(option)]
    others = [option.label for option in listed if not is_gguf(option) and option.label != "BF16"]
    if types and others:
        raise ConfigError(
            f"options {', '.join(types)} are types of GGUF files and {', '.join(others)} are not: no format "
            "holds both; leave one kind out"
        )
    alone = [name for name in formats if plans_alone(name)]
    if alone and (len(formats) > 1 or not types):
        hint = "give GGUF types as options and nothing but a gguf format"
        raise ConfigError(
            f"format {','.join(formats)}: a GGUF file has a plan of its own, so AutoScheme cannot choose for "
            f"it with other schemes or beside other formats; {hint}"
        )


def with_scheme(
    options: Options, scheme: str | Mapping[str, Any], rules: Mapping[str, Any] | None = None
) -> Options:
    """The options of an ordinary run: a scheme, and the user's rules with further ones behind them."""
    merged = {**(options.scheme.layer_config or {}), **(rules or {})}
    changed = replace(options.scheme, scheme=scheme, layer_config=merged or None)
    return replace(options, scheme=changed, given=options.given | {"scheme"})
