"""What the commands say by their exit code."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
"""The work failed."""
REQUEST: Final = 2
"""The request is wrong or asks for what is not there."""
TOO_FAR: Final = 3
"""A model is measured to be further from its original than it may be."""
INTERRUPTED: Final = 130
"""After Ctrl-C, as shells have it."""
