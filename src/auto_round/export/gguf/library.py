"""The `gguf` package, imported when a GGUF file is read or written and nowhere else."""

from __future__ import annotations

from typing import Any

from auto_round.errors import ConfigError


def gguf() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf as module
    except ImportError as error:
        raise ConfigError("GGUF files need the gguf package of llama.cpp: pip install gguf") from error
    return module
