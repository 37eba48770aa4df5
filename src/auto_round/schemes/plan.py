"""Plan: what becomes of every layer of a model, decided before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from auto_round.errors import ConfigError, InternalError
from auto_round.facts.layer import Layer
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.rules import Kind, Rule
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.schemes.size import PlanSize, measure

if TYPE_CHECKING:
    from auto_round.numerics.activation_float import InputFormat
    from auto_round.numerics.format import Format

_JSON_VERSION = 1


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; field names are those of the command line.

    Attributes:
        scheme: preset name, dictionary of fields, or a scheme.
        overrides: single fields that replace those of the scheme; None values mean not given.
        layer_config: layer name or pattern -> scheme.
        ignore_layers: layers to keep, comma list or sequence.
        quant_lm_head: quantize the output head too.
        quant_nontext_module: quantize the blocks of encoders for images and sound too.
        quant_mtp: round the layers for multi-token prediction too.
        to_quant_block_names: prefixes of the blocks to quantize; None for all.
        one_group_size: where a group size that nobody asked for does not divide all rows, every layer takes
            the one that does, for formats that hold one only.
        chosen: layers whose scheme AutoScheme chose; rules of `layer_config` with these names are its own.
    """

    scheme: str | Mapping[str, Any] | QuantizationScheme = "W4A16"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layer_config: Mapping[str, Any] | None = None
    ignore_layers: str | Iterable[str] | None = None
    quant_lm_head: bool = False
    quant_nontext_module: bool = False
    quant_mtp: bool = False
    to_quant_block_names: str | Iterable[Any] | None = None
    one_group_size: bool = False
    chosen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of every layer.

    Attributes:
        scheme: the scheme of layers that nothing else is said of.
        entries: layer name -> its scheme and why, in the order of execution.
        rules: the user's `layer_config`, strongest first, so that exporters may repeat its patterns.
        ignored: entries of the user's `ignore_layers` that keep a layer.
        block_prefixes: the user's `to_quant_block_names`; empty for all blocks.
        tied_head: name of the head when it shares its tensor with the embedding, else None.
        untie_head: the tied head is quantized: the exporter writes it apart, or refuses.
        warnings: what the user may want to change.
    """

    scheme: QuantizationScheme
    entries: Mapping[str, PlanEntry]
    rules: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    block_prefixes: tuple[str, ...] = ()
    tied_head: str | None = None
    untie_head: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of the layers that will be quantized, in the order of execution."""
        return tuple(name for name, entry in self.entries.items() if entry.scheme is not None)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers that stay as they are, in the order of execution."""
        return tuple(name for name, entry in self.entries.items() if entry.scheme is None)

    def scheme_of(self, name: str) -> QuantizationScheme | None:
        """Scheme of a layer; None when it is kept.

        Raises:
            InternalError: the plan knows no such layer.
        """
        if name not in self.entries:
            raise InternalError(f'the plan knows no layer "{name}"')
        return self.entries[name].scheme

    def format_of(self, name: str) -> Format | None:
        """Numeric format of a layer; None when it is kept.

        Raises:
            InternalError: the plan knows no such layer.
        """
        scheme = self.scheme_of(name)
        return None if scheme is None else scheme.weight_format()

    def activation_of(self, name: str) -> InputFormat | None:
        """What the input of a layer is rounded to; None when it is left alone.

        Raises:
            InternalError: the plan knows no such layer.
        """
        scheme = self.scheme_of(name)
        return None if scheme is None else scheme.activation_format()

    def inputs_of(self, layer: Layer) -> InputFormat | None:
        """`activation_of` a layer, its number stored in the dtype in which readers hold that of the layer."""
        from auto_round.numerics.activation_float import CalibratedScale

        fmt = self.activation_of(layer.name)
        return fmt.stored_in(layer.dtype) if isinstance(fmt, CalibratedScale) else fmt

    def measure(self, layers: Iterable[Layer], *, stored_bytes: Mapping[str, int] | None = None) -> PlanSize:
        """Weights and bytes of the layers, before and after.

        Args:
            layers: the layers that the plan was made for.
            stored_bytes: layer name -> bytes on disk, where an exporter knows better than the format alone.
        """
        shared = frozenset({self.tied_head} if self.tied_head else ())
        return measure(self.entries, layers, stored_bytes=stored_bytes, shared=shared)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal one."""
        schemes: dict[QuantizationScheme, int] = {}
        for entry in self.entries.values():
            if entry.scheme is not None:
                schemes.setdefault(entry.scheme, len(schemes))
        document = {
            "version": _JSON_VERSION,
            "scheme": self.scheme.to_dict(),
            "schemes": [scheme.to_dict() for scheme in schemes],
            "entries": {
                name: [None if entry.scheme is None else schemes[entry.scheme], entry.reason, entry.fixed]
                for name, entry in self.entries.items()
            },
            "rules": [
                {
                    "key": r.key,
                    "kind": r.kind.value,
                    "scheme": r.scheme and r.scheme.to_dict(),
                    "regex": r.regex,
                }
                for r in self.rules
            ],
            "ignored": self.ignored,
            "block_prefixes": self.block_prefixes,
            "tied_head": self.tied_head,
            "untie_head": self.untie_head,
            "warnings": self.warnings,
        }
        return json.dumps(document, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ConfigError: not such a text.
        """
        try:
            document: dict[str, Any] = json.loads(text)
            schemes = [QuantizationScheme.from_dict(fields) for fields in document["schemes"]]
            entries = {
                name: PlanEntry(None if index is None else schemes[index], reason, fixed)
                for name, (index, reason, fixed) in document["entries"].items()
            }
            return cls(
                scheme=QuantizationScheme.from_dict(document["scheme"]),
                entries=entries,
                rules=tuple(_read_rule(fields) for fields in document["rules"]),
                ignored=tuple(document["ignored"]),
                block_prefixes=tuple(document["block_prefixes"]),
                tied_head=document["tied_head"],
                untie_head=document["untie_head"],
                warnings=tuple(document["warnings"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"not a plan as JSON: {type(error).__name__}: {error}") from error


def _read_rule(fields: Mapping[str, Any]) -> Rule:
    scheme = None if fields["scheme"] is None else QuantizationScheme.from_dict(fields["scheme"])
    return Rule(fields["key"], Kind(fields["kind"]), scheme, fields["regex"])
