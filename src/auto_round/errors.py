"""Errors of this package: one root, one class per kind of remedy.

Each is also the built-in error that Python, PyTorch and Transformers raise in its place, so that code which
expects that one still catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class AutoRoundError(Exception):
    """Root of every error raised on purpose by this package."""


class ConfigError(AutoRoundError, ValueError):
    """The request is wrong and the user can mend it (argument, pattern, data set, folder)."""


class ArgumentError(ConfigError, TypeError):
    """A call has an argument that there is not, or has one twice."""


class MissingError(ConfigError, FileNotFoundError):
    """A file or folder that the user names is not there."""


class CheckpointError(AutoRoundError, OSError):
    """A file of a checkpoint is missing, truncated or contradicts itself; names file, tensor and offset."""


class NumericsError(AutoRoundError, ArithmeticError):
    """Numbers that cannot be quantized: non-finite weights or losses; names the tensor and the count."""


class RankError(AutoRoundError, ConnectionError):
    """Another process of a run on several has ended, cannot be reached, or came to another result."""


class InternalError(AutoRoundError):
    """A broken promise inside this package: a bug to report, never the user's fault."""


_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
"""Texts of errors that mean "no memory" and are no `MemoryError`: PyTorch's for host and accelerators, and
the system's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended, on the host or on an accelerator."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one part (kernel, exporter, layout) cannot do what was asked.

    Attributes:
        who: name of the part that refuses.
        reason: what it cannot do, in one sentence.
        remedy: what to do about it; empty when nothing helps.
    """

    who: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.who}: {self.reason}" + (f" ({self.remedy})" if self.remedy else "")


class UnsupportedError(AutoRoundError, NotImplementedError, ValueError):
    """No part can do what was asked; carries every refusal."""

    def __init__(self, message: str, refusals: Sequence[Refusal] = ()) -> None:
        super().__init__("\n  - ".join([message, *map(str, refusals)]))
        self.refusals = tuple(refusals)


class CannotHoldError(UnsupportedError):
    """A plan that no fault is found with, but that a format cannot hold."""


class NothingQuantizedError(UnsupportedError):
    """The model would only be copied: none of its matrices can be quantized as asked."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint such as `did you mean "W4A16", "W8A16"?`, or the known names when none is near."""
    names = list(known)
    folded = {n.casefold(): n for n in names}
    near = difflib.get_close_matches(name.casefold(), list(folded), n=count, cutoff=0.5)
    if near:
        return "did you mean " + ", ".join(f'"{folded[n]}"' for n in near) + "?"
    return "known: " + ", ".join(f'"{n}"' for n in names[:20]) + (", ..." if len(names) > 20 else "")
