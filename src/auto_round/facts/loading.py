"""What Transformers does with a model's tensors while it loads them, for formats that others unpack there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Loading:
    """What becomes of the tensors of a checkpoint on their way into the model.

    Attributes:
        converted: for each conversion of tensors called `weight`, their names on disk: experts that are
            stacked, convolutions that are put side by side, matrices that are split.
        rebuilt: `quant_method` -> names on disk of the tensors of modules that Transformers replaces by
            others when it loads a folder of that method; the module, where the folder has its experts one by
            one.
        weights_only: names on disk of tensors that it renames only where they are called `weight`: what they
            are packed into under other names (`qweight`) it does not find.
    """

    converted: tuple[tuple[str, ...], ...] = ()
    rebuilt: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights_only: frozenset[str] = frozenset()
