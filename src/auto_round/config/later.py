"""What users of other versions may ask for and this one does not do yet: understood, and answered plainly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from auto_round.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Later:
    """Names that belong to one piece of later work.

    Attributes:
        feature: what the names ask for, as the subject of "is not there yet".
        switches: names that stand alone.
        values: names that take one value.
        lists: names that take any number of values.
    """

    feature: str
    switches: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, without dashes."""
        return (*self.switches, *self.values, *self.lists)


LATER: Final = (
    Later(
        "a choice of algorithms (AWQ, SVDQuant, rotations)",
        switches=(
            "awq_apply_clip",
            "awq_clip_as_init",
            "enable_svdquant_smooth",
            "enable_svdquant_residual_early_stop",
            "fuse_online_to_weight",
            "no_fuse_online_to_weight",
            "allow_online_rotation",
            "no_allow_online_rotation",
        ),
        values=(
            "algorithm",
            "alg",
            "alg_configs",
            "awq_duo_scaling",
            "awq_n_grid",
            "awq_seqlen",
            "awq_smooth_batch_size",
            "svdquant_rank",
            "svdquant_smooth_num_grids",
            "svdquant_smooth_max_calibration_calls",
            "svdquant_residual_iters",
            "svdquant_low_rank_dtype",
            "svdquant_target_modules",
            "svdquant_exclude_modules",
            "svdquant_model_adapter",
            "rotation_config",
            "rotation_type",
            "rotation_backend",
            "rotation_block_size",
        ),
    ),
    Later(
        "evaluation of vision-language models",
        switches=("vlmeval", "lmms"),
    ),
)

GRANTED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mllm": "the model's configuration says whether it reads images",
        "model_free": "--recipe rtn rounds plainly, and that never builds the model",
        "disable_model_free": "the result is the same with and without the model",
    }
)
"""Switches that change nothing here, and why."""


def granted_notes(names: Iterable[str]) -> list[str]:
    """One sentence for each name of `GRANTED`."""
    return [f"{name} has no effect: {GRANTED[name]}" for name in names if name in GRANTED]


def later_names() -> dict[str, str]:
    """Map every name of later work to the feature it belongs to."""
    return {name: later.feature for later in LATER for name in later.names}


def not_there_yet(names: Iterable[str], *, prefix: str = "") -> UnsupportedError:
    """Return the error that says which names ask for what is not there yet."""
    features = later_names()
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(features[name], []).append(prefix + name)
    parts = [
        f"{feature} is not there yet in this version (asked for by {', '.join(n)})"
        for feature, n in wanted.items()
    ]
    return UnsupportedError("; ".join(parts) + ". Leave " + ("it" if len(parts) == 1 else "them") + " out.")


def split_later(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Split arguments into those of this version and the names of later work that ask for something.

    None, False and empty values ask for nothing and are dropped.
    """
    features = later_names()
    now = {name: value for name, value in given.items() if name not in features and name not in GRANTED}
    asked = [name for name, value in given.items() if name in features and not _is_nothing(value)]
    return now, tuple(asked)


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str) and not value)
