"""Options of AutoScheme: a scheme for each layer, chosen for a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.config import values
from auto_round.config.option import Spec, option, settle
from auto_round.errors import ConfigError

FIRST_ORDER = "first_order"
"""A way to measure sensitivity whose scores are no divergences."""

NOT_FUSED = ("none",)
"""The set in `shared_layers` that says: what engines fuse need not share a scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSchemeOptions:
    """A scheme for each layer, chosen for a budget (AutoScheme)."""

    avg_bits: tuple[float, ...] = option(
        (),
        Spec(
            "bits per quantized weight to reach, at most, by the best mix of --options; of several "
            "(2.5,3,4) each gets an output of its own",
            flags=("avg_bits", "target_bits"),
            aliases=("target_bits",),
            convert=values.numbers,
        ),
    )
    target_size: tuple[int, ...] = option(
        (),
        Spec(
            'size of the weight files to reach, at most, such as "4.2GB", instead of avg_bits',
            convert=values.sizes,
        ),
    )
    target_kl: float | None = option(
        None,
        Spec("divergence from the original to stay below by prediction, nats per token, instead of avg_bits"),
    )
    scheme_options: tuple[Any, ...] = option(
        (),
        Spec(
            "schemes to choose from: comma list of presets (W2A16,W4A16,BF16) and of fields in braces "
            "({bits:3,group_size:64}, in quotes for the shell); from Python also dicts and "
            "QuantizationSchemes",
            flags=("options",),
            convert=values.schemes,
        ),
    )
    shared_layers: tuple[tuple[str, ...], ...] = option(
        (),
        Spec(
            "layers that get one scheme, beside those that engines fuse: names, or patterns that are matched "
            'inside each block; may be given again for another set; "none": each layer gets a scheme of its '
            "own, for readers that fuse none, such as Transformers",
            many=True,
            again=True,
            convert=values.name_groups,
        ),
    )
    ignore_scale_zp_bits: bool = option(
        False, Spec("count the bits of the codes only, not those of scales and zero points")
    )
    score_method: str = option(
        "fisher",
        Spec(
            "how sensitivity is measured: fisher squares what rounding changes along gradients of the "
            "model's own predictions; kl measures the divergence of the whole model, which takes a time that "
            "grows with the square of the number of blocks; first_order multiplies gradients of the text's "
            "loss with what rounding changed",
            choices=("fisher", "kl", FIRST_ORDER),
        ),
    )
    score_nsamples: int | None = option(
        None, Spec("rows to measure sensitivity on; 16 when not given, 64 for experts", low=1)
    )
    score_seqlen: int = option(256, Spec("tokens in each of these rows", low=2))
    score_batch_size: int = option(8, Spec("rows measured at a time; the scores do not depend on it", low=1))
    score_dataset: str | None = option(
        None, Spec("text to measure sensitivity on; dataset when not given", paths="data sets")
    )
    score_device_map: str | Mapping[str, str] | None = option(
        None, Spec("where to measure sensitivity; device_map when not given", convert=values.device_or_none)
    )
    score_low_gpu_mem_usage: bool = option(
        True,
        Spec(
            "keep activations in host memory while sensitivity is measured",
            off=("no_score_low_gpu_mem_usage",),
            off_help="keep activations on the GPU while sensitivity is measured",
        ),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise ConfigError(
                f'option "target_kl" cannot be {self.target_kl:g}: expected nats per token above zero, '
                "such as 0.02"
            )
        targets = [name for name in ("avg_bits", "target_size", "target_kl") if getattr(self, name)]
        if len(targets) > 1:
            raise ConfigError(f"{' and '.join(targets)} are both targets: give one of them")
        if targets and not self.scheme_options:
            raise ConfigError(
                f"{targets[0]} needs the schemes to choose from: --options W2A16,W4A16,W8A16, in Python "
                "scheme=AutoScheme(avg_bits=..., options=...)"
            )
        if self.target_kl is not None and self.score_method == FIRST_ORDER:
            raise ConfigError(
                "target_kl: scores of first_order are no divergences; use score_method fisher or kl"
            )
        if not targets and self.scheme_options:
            raise ConfigError("options are schemes to choose from, which needs a target: --avg_bits 4")
        if not targets and self.shared_layers:
            raise ConfigError(
                "shared_layers is for a choice of schemes, which needs --avg_bits and --options"
            )

    @property
    def fused(self) -> bool:
        """Whether layers that engines fuse share a scheme."""
        return NOT_FUSED not in self.shared_layers

    @property
    def joined(self) -> tuple[tuple[str, ...], ...]:
        """Sets of layers that the user wants to share a scheme."""
        return tuple(names for names in self.shared_layers if names != NOT_FUSED)

    @property
    def chooses_embedding(self) -> bool:
        """Whether an embedding that is rounded gets a scheme by choice: where its size counts."""
        return not self.avg_bits and self.score_method != FIRST_ORDER

    @property
    def asked(self) -> bool:
        """Whether schemes are to be chosen."""
        return bool(self.avg_bits or self.target_size or self.target_kl)
