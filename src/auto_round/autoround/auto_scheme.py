"""AutoScheme: what a user gives as `scheme` to have one chosen for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.log import logger

_METHODS = {"default": None, "deltaloss": None, "fisher": "fisher", "kl": "kl", "first_order": "first_order"}
"""What may be asked for as `method` -> option `score_method`; None for the usual one."""


@dataclass(frozen=True, slots=True)
class AutoScheme:
    """A scheme for each layer, chosen so that the model changes least within a budget.

        AutoRound(model, scheme=AutoScheme(avg_bits=3.0, options=("W2A16G64", "W4A16", "W8A16")))

    Attributes:
        avg_bits: bits per quantized weight to reach, at most; several give an output each.
        options: schemes to choose from: presets, dicts or `QuantizationScheme`s; a comma list works too.
        shared_layers: sets of layers that get one scheme, beside those that engines fuse: names, or patterns
            that are matched inside each block; a flat list is one set. `[["none"]]`: each layer gets a scheme
            of its own.
        method: how sensitivity is measured: "default" ("fisher"), "kl" or "first_order".
        ignore_scale_zp_bits: count the bits of codes only.
        batch_size: rows at a time while sensitivity is measured; the scores do not depend on it.
        nsamples: rows for that; None for 16, or 64 where there are experts.
        seqlen: tokens in each of them; None for 256.
        dataset: data for that; None for that of `AutoRound`.
        device_map: where that is done; None for that of `AutoRound`.
        enable_torch_compile: accepted; sensitivity is measured without.
        disable_opt_rtn: accepted; layers are rounded as the run itself will round them.
        low_gpu_mem_usage: keep activations in host memory meanwhile.
        target_size: size of the weight files instead of `avg_bits`, bytes or text such as "4.2GB".
        target_kl: predicted divergence from the original instead of `avg_bits`, nats per token.
    """

    avg_bits: float | Sequence[float] | None = None
    options: str | Iterable[Any] = ()
    shared_layers: Iterable[Iterable[str]] | None = None
    method: str = "default"
    ignore_scale_zp_bits: bool = False
    batch_size: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    dataset: Any = None
    device_map: Any = None
    enable_torch_compile: bool | None = None
    disable_opt_rtn: bool | None = None
    low_gpu_mem_usage: bool = True
    target_size: int | str | None = None
    target_kl: float | None = None

    def arguments(self) -> dict[str, Any]:
        """The same as options by name; a `dataset` that is an object is left to who holds it.

        Raises:
            ConfigError: no target, no options, or an unknown method.
        """
        method = self.method.casefold()
        if method not in _METHODS:
            raise ConfigError(f'AutoScheme method "{self.method}": {nearest(self.method, _METHODS)}')
        if method == "deltaloss":
            logger.info(
                "AutoScheme measures by the Fisher information instead of DeltaLoss: see docs/autoscheme.md"
            )
        targets = {"avg_bits": self.avg_bits, "target_size": self.target_size, "target_kl": self.target_kl}
        if all(value is None for value in targets.values()):
            raise ConfigError("AutoScheme needs a target: AutoScheme(avg_bits=4, options=...)")
        given: Mapping[str, Any] = {
            **targets,
            "scheme_options": self.options,
            "shared_layers": self.shared_layers,
            "ignore_scale_zp_bits": self.ignore_scale_zp_bits,
            "score_method": _METHODS[method],
            "score_batch_size": self.batch_size,
            "score_nsamples": self.nsamples,
            "score_seqlen": self.seqlen,
            "score_dataset": self.dataset if isinstance(self.dataset, str | Path) else None,
            "score_device_map": self.device_map,
            "score_low_gpu_mem_usage": self.low_gpu_mem_usage,
        }
        return {name: value for name, value in given.items() if value is not None}
