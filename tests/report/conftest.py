"""Tiny models on disk, made once."""

from __future__ import annotations

from pipeline.conftest import tiny

__all__ = ["tiny"]
