"""Options that spare memory."""

from __future__ import annotations

from dataclasses import dataclass

from auto_round.config.option import Spec, option, settle


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What to save memory at the cost of time."""

    memory: str = option(
        "auto",
        Spec(
            "how to spare memory: auto plans for what is there; low and lowest take less of it and more time",
            choices=("auto", "low", "lowest"),
        ),
    )
    low_gpu_mem_usage: bool = option(False, Spec("keep activations in host memory instead of on the GPU"))
    low_cpu_mem_usage: bool = option(
        True,
        Spec(
            "hold one block in host memory and spill activations to disk when they are large",
            off=("disable_low_cpu_mem_usage",),
            off_help="keep everything in host memory",
        ),
    )

    targets_ahead: str = option(
        "auto",
        Spec(
            "compute what the next blocks should give while others are tuned: auto where an accelerator is "
            "free for it, on also beside the tuning on the same device, off never",
            choices=("auto", "on", "off"),
        ),
    )

    def __post_init__(self) -> None:
        settle(self)
