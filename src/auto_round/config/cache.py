"""Options of the key/value cache and of attention: which of their scales are calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from auto_round.config.option import Spec, option, settle
from auto_round.errors import ConfigError

_LATER = ("nvfp4", "fp4", "float4_e2m1", "fp8_e5m2", "float8_e5m2", "int8")
"""Names of numbers that are understood and not there yet."""


def _fp8(value: Any) -> str:
    """Turn `"fp8"`, `"float8_e4m3fn"` or `torch.float8_e4m3fn` into `"fp8"`."""
    word = str(value).casefold().removeprefix("torch.")
    if word in ("fp8", "fp8_e4m3", "float8_e4m3fn"):
        return "fp8"
    if word in _LATER:
        raise ValueError("these numbers are not there yet; use fp8")
    raise ValueError("expected fp8 (float8_e4m3fn), or leave it out to keep the model's numbers")


_GRANULARITIES = ("tensor", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """Scales of the key/value cache and of attention, for engines that hold them in 8 bits."""

    static_kv_dtype: str | None = option(
        None,
        Spec("calibrate scales of keys and values: fp8 (float8_e4m3fn); llm_compressor only", convert=_fp8),
    )
    static_attention_dtype: str | None = option(
        None, Spec("the same for queries, keys and values: fp8 (float8_e4m3fn)", convert=_fp8)
    )
    static_kv_granularity: str | None = option(
        None,
        Spec(
            "scales of keys and values: one a tensor, which is the default, or one a head",
            choices=_GRANULARITIES,
        ),
    )
    static_attention_granularity: str | None = option(
        None, Spec("the same for queries, keys and values", choices=_GRANULARITIES)
    )

    def __post_init__(self) -> None:
        settle(self)
        both = {self.static_kv_granularity, self.static_attention_granularity} - {None}
        if len(both) > 1:
            raise ConfigError(
                "static_kv_granularity and static_attention_granularity contradict each other: keys and "
                "values have one kind of scales. Give one of them, or the same to both"
            )
        for kind in ("kv", "attention"):
            dtype, granularity = f"static_{kind}_dtype", f"static_{kind}_granularity"
            if getattr(self, granularity) is not None and getattr(self, dtype) is None:
                raise ConfigError(f"{granularity} says nothing without {dtype}: give {dtype} fp8 too")

    @property
    def granularity(self) -> str:
        """`tensor` or `head`."""
        return self.static_attention_granularity or self.static_kv_granularity or "tensor"
