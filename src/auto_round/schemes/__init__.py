"""Schemes: which format each layer gets. Torch is imported only when a format is built."""

from __future__ import annotations

from auto_round.schemes.make import make_plan
from auto_round.schemes.plan import Plan, PlanRequest
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme, parse_scheme

__all__ = ["PRESET_SCHEMES", "Plan", "PlanRequest", "QuantizationScheme", "make_plan", "parse_scheme"]
