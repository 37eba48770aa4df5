"""The folder in which `quantize()` keeps what it made."""

from __future__ import annotations

import tempfile

from auto_round.config import read_environment
from auto_round.errors import ConfigError


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder where the environment wants it, else in the system's place; it goes with the object.

    Raises:
        ConfigError: it cannot be made there.
    """
    space = read_environment().work_space
    try:
        if space is not None:
            space.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="auto_round-", dir=space)
    except OSError as error:
        raise ConfigError(
            f"AR_WORK_SPACE is {space or tempfile.gettempdir()}, where no folder can be made "
            f"({error.strerror}): name another one"
        ) from error
