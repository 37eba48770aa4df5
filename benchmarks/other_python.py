"""Runs of another Python's packages, for benchmarks against another package of our name."""

from __future__ import annotations

import os
import sys


def environment_of(python: str) -> dict[str, str]:
    """Environment variables for a Python: a path to our sources would give another one our package."""
    hidden = set() if python == sys.executable else {"PYTHONPATH"}
    return {name: value for name, value in os.environ.items() if name not in hidden}
