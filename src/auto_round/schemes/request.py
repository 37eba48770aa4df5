"""From the user's options to the request for a plan."""

from __future__ import annotations

from collections.abc import Mapping

from auto_round.config.groups import SchemeOptions
from auto_round.schemes.plan import PlanRequest
from auto_round.schemes.scheme import QuantizationScheme


def plan_request(
    wanted: SchemeOptions, scale_dtype: str | None = None, chosen: frozenset[str] = frozenset()
) -> PlanRequest:
    """What the user asked of the plan.

    Args:
        wanted: the user's options.
        scale_dtype: dtype of scales where the user names none; None for the scheme's own.
        chosen: layers whose scheme AutoScheme chose.
    """
    overrides = wanted.overrides()
    if scale_dtype is not None and not _names_scale_dtype(wanted):
        overrides["scale_dtype"] = scale_dtype
    return PlanRequest(
        scheme=wanted.scheme,
        overrides=overrides,
        layer_config=wanted.layer_config,
        ignore_layers=wanted.ignore_layers or None,
        quant_lm_head=wanted.quant_lm_head,
        quant_nontext_module=wanted.quant_nontext_module,
        quant_mtp=wanted.quant_mtp,
        to_quant_block_names=wanted.to_quant_block_names or None,
        chosen=chosen,
    )


def _names_scale_dtype(wanted: SchemeOptions) -> bool:
    """Whether the user chose a dtype of scales; the default of a scheme object is no choice."""
    if wanted.scale_dtype is not None:
        return True
    if isinstance(wanted.scheme, QuantizationScheme):
        return wanted.scheme.scale_dtype != QuantizationScheme().scale_dtype
    return isinstance(wanted.scheme, Mapping) and "scale_dtype" in wanted.scheme
