"""Rules: what a user wrote about layers, matched against the layers that exist."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from types import MappingProxyType
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.facts.layer import Block
from auto_round.schemes.scheme import QuantizationScheme, parse_scheme

_PLAIN = re.compile(r"[\w.:/\-]+\Z")
"""Text without anything special to a regular expression but the dot."""

_MAX_HINTS = 4000
"""Names that are compared with an unknown one; a large mixture of experts has 60,000."""


class Kind(Enum):
    """How a key of `layer_config` names layers; the earlier kind wins where several keys match a layer."""

    EXACT = "exact"
    PARTIAL = "partial"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `layer_config`.

    Attributes:
        key: as the user wrote it.
        kind: how it names layers.
        scheme: what these layers get; None keeps them as they are.
        regex: expression that finds the same layers by `re.search`, and by `re.fullmatch` where the key
            allows that.
    """

    key: str
    kind: Kind
    scheme: QuantizationScheme | None
    regex: str


@dataclass(frozen=True, slots=True)
class Match:
    """A rule and the layers that it names.

    Attributes:
        rule: the rule.
        names: names of the layers, never empty.
    """

    rule: Rule
    names: frozenset[str]


_NONE: Mapping[str, None] = MappingProxyType({})


def match_layer_config(
    layer_config: Mapping[str, Any] | None,
    base: QuantizationScheme,
    names: Sequence[str],
    others: Sequence[str] = (),
) -> tuple[Match, ...]:
    """Rules of a `layer_config` with the layers they name, strongest first.

    An exact name is stronger than a partial one, that stronger than a regular expression; keys of one kind
    keep the user's order and the first wins. A plain text names the layers that contain it as whole dotted
    components (`mlp.gate` is not `mlp.gate_proj`, `layers.1` is not `layers.10`); when there are none, the
    layers that contain it as text. Anything else is a regular expression for `re.search`.

    Args:
        layer_config: key -> preset name, dictionary of fields (missing ones come from `base`) or scheme.
        base: the scheme of all other layers.
        names: every layer that exists.
        others: modules that are never quantized; a key that keeps them at 16 bits asks for nothing.

    Raises:
        ConfigError: a key that matches nothing (names the nearest) or what is never quantized, a malformed
            expression (names the position), a value that is no scheme.
    """
    if layer_config is None:
        return ()
    if not isinstance(layer_config, Mapping):
        raise ConfigError(
            f"layer_config must be a dictionary of layer name or pattern -> scheme, got {layer_config!r}"
        )
    known, beside = dict.fromkeys(names), dict.fromkeys(others)
    matches = [match_rule(key, value, base, known, beside) for key, value in layer_config.items()]
    order = list(Kind)
    found = (match for match in matches if match.names)
    return tuple(sorted(found, key=lambda match: order.index(match.rule.kind)))


def match_rule(
    key: Any,
    value: Any,
    base: QuantizationScheme,
    names: Mapping[str, None],
    others: Mapping[str, None] = _NONE,
) -> Match:
    """One rule of a `layer_config` with the layers it names; arguments and errors as there.

    Args:
        key: layer name or pattern.
        value: preset name, dictionary of fields or scheme.
        base: the scheme of all other layers.
        names: every layer that exists, as keys: a `layer_config` may name each of 60,000 layers.
        others: modules that are never quantized.

    Returns:
        The rule; it names no layer where it keeps what is never quantized.
    """
    if not isinstance(key, str) or not key.strip(". "):
        raise ConfigError(f"a key of layer_config is a layer name or a pattern, got {key!r}")
    try:
        scheme = parse_scheme(value, base=base)
    except ConfigError as error:
        raise ConfigError(f'layer_config "{key}": {error}') from error
    kind, regex, found = _find(key, names)
    kept = not scheme.quantized and not scheme.act_quantized
    beside = [] if found else _find(key, others)[2]
    if beside and not kept:
        raise ConfigError(
            f'layer_config "{key}" names {beside[0]}, which keeps 16 bits outside of GGUF files: '
            "leave the key out; in GGUF files (scheme GGUF:Q4_K_M or format gguf:q4_k_m) embeddings may have "
            "types of their own"
        )
    if not found and not beside:
        raise ConfigError(f'layer_config "{key}" matches no layer; {nearest_layers(key, names)}')
    rule = Rule(key, kind, None if kept else replace(scheme, recipe=None), regex)
    return Match(rule, frozenset(found))


def find_layers(key: str, names: Mapping[str, None], option: str) -> list[str]:
    """Layers that a name or pattern names, as in `layer_config`; `*.q_proj` works too.

    Args:
        key: exact name, part of a name, regular expression, or shell pattern that begins with `*`.
        names: every layer, as keys.
        option: what the user wrote it in, for errors.

    Raises:
        ConfigError: a malformed expression.
    """
    if key.startswith("*"):  # no regular expression begins so
        return fnmatch.filter(names, key)
    return _find(key, names, option)[2]


def _find(key: str, names: Mapping[str, None], option: str = "layer_config") -> tuple[Kind, str, list[str]]:
    """Kind of a key, the expression that stands for it, and the names it finds."""
    if key in names:
        return Kind.EXACT, re.escape(key), [key]
    if _PLAIN.match(key):
        text = re.escape(key.strip("."))
        whole, part = rf"(?:.*\.)?{text}(?:\..*)?", rf".*{_whole_number(text)}.*"
        holding = [name for name in names if key.strip(".") in name]  # 30 times faster than an expression
        for regex in (whole, part):
            pattern = re.compile(regex)
            found = [name for name in holding if pattern.fullmatch(name)]
            if found:
                return Kind.PARTIAL, _anchored(regex), found
        return Kind.PARTIAL, part, []
    pattern = _compile(key, option)
    found = [name for name in names if pattern.search(name)]
    return Kind.REGEX, _widened(key, set(found), names), found


def _whole_number(text: str) -> str:
    """Keep a number at either end of a text from matching a part of a longer number."""
    before = r"(?<!\d)" if text[:1].isdigit() else ""
    after = r"(?!\d)" if text[-1:].isdigit() else ""
    return before + text + after


def _anchored(regex: str) -> str:
    """The expression for readers that use `re.search`: without ends it would also find parts of names."""
    return f"^{regex}$"


def _widened(key: str, found: set[str], names: Iterable[str]) -> str:
    """The key or `.*key.*`, whichever finds the same names by `re.fullmatch`; else the key as it is."""
    if all(re.fullmatch(key, name) for name in found):
        return key
    try:
        pattern = _compile(f".*(?:{key}).*")
    except ConfigError:
        return key
    same = {name for name in names if pattern.fullmatch(name)} == found
    return pattern.pattern if same else key


def loose_number(match: Match, names: Iterable[str]) -> str | None:
    """Hint when a dot after a number lets an expression name longer numbers: `layers.1.*` and layer 10."""
    key = match.rule.key
    strict = re.sub(r"(?<=\d)\.(?=\*)", r"\\..", re.sub(r"(?<=\d)\.(?![*+?{])", r"\\.", key))
    if match.rule.kind is not Kind.REGEX or strict == key:
        return None
    try:
        pattern = _compile(strict)
    except ConfigError:
        return None
    meant = {name for name in names if pattern.search(name)}
    extra = sorted(match.names - meant)
    if not meant or not extra:
        return None
    return (
        f'layer_config "{key}" is a regular expression whose "." stands for anything, so it names '
        f'{extra[0]} too; write "{strict}" unless that is meant'
    )


def _compile(key: str, option: str = "layer_config") -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sets within sets and the like: legal, and no business of the user
        try:
            return re.compile(key)
        except re.error as error:
            where = "" if error.pos is None else f" at position {error.pos}"
            raise ConfigError(
                f'{option} "{key}" is not a valid regular expression: {error.msg}{where}; '
                'write ".*" for anything and "\\." for a dot'
            ) from error
        except (OverflowError, RecursionError) as error:
            raise ConfigError(f'{option} "{key}" is not a valid regular expression: {error}') from error


def match_ignored(
    ignore_layers: str | Iterable[str] | None, names: Sequence[str], others: Iterable[str] = ()
) -> dict[str, str]:
    """Layers that the user wants kept: layer name -> the entry that names it.

    Entries match as substrings; one that ends with a digit gets a dot appended, so that `layers.1` does not
    match `layers.10`.

    Args:
        ignore_layers: comma list or sequence.
        names: every layer that exists.
        others: names of modules that are never quantized; naming them is no error.

    Raises:
        ConfigError: an entry that matches nothing; names the nearest.
    """
    ignored: dict[str, str] = {}
    others = [f"{name}." for name in others]
    for entry in _entries(ignore_layers, "ignore_layers"):
        text = entry + "." if entry[-1].isdigit() else entry
        found = [name for name in names if text in f"{name}."]
        if not found and not any(text in other for other in others):
            raise ConfigError(f'ignore_layers "{entry}" matches no layer; {nearest_layers(entry, names)}')
        for name in found:
            ignored.setdefault(name, entry)
    return ignored


def match_blocks(
    to_quant_block_names: str | Iterable[Any] | None, blocks: Sequence[Block]
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Prefixes that the user restricts the work to, and the indices of the blocks below them.

    Args:
        to_quant_block_names: comma list, sequence, or sequence of sequences of prefixes such as
            `model.layers` or `model.layers.3`, as on disk or in the module tree; None or empty for all.
        blocks: every block.

    Raises:
        ConfigError: a prefix that holds no block; names the nearest.
    """
    prefixes = tuple(_entries(to_quant_block_names, "to_quant_block_names"))
    if not prefixes:
        return (), frozenset(block.index for block in blocks)
    chosen: set[int] = set()
    for prefix in prefixes:
        start = prefix.strip(".") + "."
        found = {
            b.index for b in blocks if f"{b.module}.".startswith(start) or f"{b.disk}.".startswith(start)
        }
        if not found:
            known = dict.fromkeys(p for b in blocks for p in (b.disk.rpartition(".")[0], b.disk))
            raise ConfigError(f'to_quant_block_names "{prefix}" names no block; {nearest(prefix, known)}')
        chosen |= found
    return prefixes, frozenset(chosen)


def _entries(value: Any, argument: str) -> list[str]:
    """Texts of a comma list, a sequence, or a sequence of sequences; blanks dropped."""
    if value is None:
        return []
    if isinstance(value, str):
        return [text for text in map(str.strip, value.split(",")) if text]
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        raise ConfigError(f"{argument} must be a comma list or a list of texts, got {value!r}")
    return [text for item in value for text in _entries(_not_none(item, argument), argument)]


def _not_none(item: Any, argument: str) -> Any:
    if item is None:
        raise ConfigError(f"{argument} must be a comma list or a list of texts, got an entry None")
    return item


def nearest_layers(key: str, names: Iterable[str]) -> str:
    """Hint with the pieces of layer names that look most like `key`.

    A key of two dotted components is compared with all pieces of two components, and so on.
    """
    text = re.sub(r"\\(.)", r"\1", key)
    text = re.sub(r"[\^$*+?()\[\]{}|]+", "", text)
    text = re.sub(r"\.{2,}", ".", text).strip(". ") or key
    width = text.count(".") + 1
    return nearest(text, islice(dict.fromkeys(_pieces(names, width)), _MAX_HINTS))


def _pieces(names: Iterable[str], width: int) -> Iterable[str]:
    for name in names:
        parts = name.split(".")
        if len(parts) <= width:
            yield name
        for start in range(max(0, len(parts) - width), -1, -1):
            yield ".".join(parts[start : start + width])
