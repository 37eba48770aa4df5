"""Which scales of the key/value cache and of attention a run calibrates, and which formats hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from auto_round.config.cache import CacheOptions
from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.exporter import Exporter
from auto_round.export.table import EXPORTERS
from auto_round.models.source import ModelSource
from auto_round.schemes.attention import AttentionPlan, AttentionScheme


def plan_caches(options: CacheOptions, source: ModelSource) -> AttentionPlan | None:
    """The scales that the user asks for; None for none.

    Raises:
        UnsupportedError: the model has no attention that can be looked into.
    """
    if options.static_attention_dtype is None and options.static_kv_dtype is None:
        return None
    scheme = AttentionScheme(options.static_attention_dtype is not None, options.granularity == "head")
    return AttentionPlan(scheme, source.attentions)


def refuse_formats(options: CacheOptions, formats: Iterable[Exporter]) -> None:
    """Refuse scales for formats that have no place for them.

    Raises:
        UnsupportedError: there is such a format; names those that have one.
    """
    if options.static_attention_dtype is None and options.static_kv_dtype is None:
        return
    others = " or ".join(exporter.name for exporter in EXPORTERS.values() if exporter.holds_scales)
    reason = "has no place for scales of the key/value cache and of attention"
    refused = [
        Refusal(exporter.name, reason, f"use the format {others}")
        for exporter in formats
        if not exporter.holds_scales
    ]
    if refused:
        raise UnsupportedError(
            "static_kv_dtype and static_attention_dtype cannot be written as asked", refused
        )


def with_scales(exporters: Mapping[str, Exporter], caches: AttentionPlan | None) -> dict[str, Exporter]:
    """The exporters, told which scales they will be given."""
    if caches is None:
        return dict(exporters)
    return {name: exporter.with_scales(caches) for name, exporter in exporters.items()}
