"""Options that say how the rounding is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from auto_round.config.option import Spec, option, settle
from auto_round.errors import ConfigError

FEW_BITS = 3
"""Up to here more is to be gained from long ways of rounding offsets than is lost by noise."""
WANDER = 0.05
"""How far, in codes, an offset may wander whose gradient is noise (measured: docs/LOG.md)."""


def check_step_size(name: str, value: float | None) -> None:
    """Refuse a step size that is not above 0 and below 10.

    Args:
        name: of the option.
        value: in codes, or in multipliers of a range; None where it follows from other options.

    Raises:
        ConfigError: it is out of these bounds.
    """
    if value is not None and not 0 < value < 10:
        raise ConfigError(f"{name} must be above 0 and below 10, got {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How the rounding is tuned."""

    iters: int = option(
        200, Spec("tuning steps per block; 0 rounds without tuning", flags=("iters", "iter"), low=0)
    )
    batch_size: int = option(
        8,
        Spec(
            "rows per step in the last fifth of a run; earlier, larger steps see a quarter or half of them",
            flags=("batch_size", "train_bs", "bs"),
            aliases=("bs", "train_bs"),
            low=1,
        ),
    )
    gradient_accumulate_steps: int = option(1, Spec("batches whose gradients are added before a step", low=1))
    lr: float | None = option(
        None,
        Spec(
            "step size of the rounding offsets; when not given 1/iters (2/iters: bits <= 3, iters >= 1000; "
            "0.087/sqrt(iters): bits >= 4, iters < 133)",
        ),
    )
    minmax_lr: float | None = option(
        None,
        Spec("step size of the range multipliers; when not given lr/2 at 2 bits, lr/4 at 3 and so on"),
    )
    lr_scheduler: Callable[[int, int], float] | None = option(  # noqa: RUF009
        None,
        Spec("function of (step, iters) giving the factor of lr; linear to zero when not given", cli=False),
    )
    momentum: float = option(0.0, Spec("momentum of the sign descent", low=0, high=1))
    nblocks: int = option(1, Spec("neighbouring blocks tuned as one", low=1))
    enable_adam: bool = option(
        False, Spec("AdamW instead of sign descent", flags=("enable_adam", "adam"), aliases=("adam",))
    )
    enable_minmax_tuning: bool = option(
        True,
        Spec(
            "tune the range of each group too",
            off=("disable_minmax_tuning",),
            off_help="keep the range of each group as it is found before tuning",
        ),
    )
    enable_norm_bias_tuning: bool = option(False, Spec("tune norm weights and biases too"))
    enable_quanted_input: bool = option(
        True,
        Spec(
            "feed each block what the quantized blocks before it give",
            off=("disable_quanted_input",),
            off_help="feed each block what the unquantized blocks before it give",
        ),
    )
    not_use_best_mse: bool = option(False, Spec("keep the last step instead of the best one"))
    dynamic_max_gap: int = option(
        -1, Spec("stop a block after so many steps without a better loss; 0 or less never", low=-1)
    )
    amp: bool = option(
        True, Spec("run blocks in 16 bits", off=("disable_amp",), off_help="run blocks in float32")
    )
    enable_torch_compile: bool | None = option(
        None,
        Spec(
            "compile the blocks; decided from the job when not given",
            off=("disable_torch_compile",),
            off_help="do not compile the blocks",
        ),
    )
    disable_opt_rtn: bool | None = option(
        None,
        Spec(
            "with iters 0: plain rounding; decided from the bits when not given",
            off=("enable_opt_rtn",),
            off_help="with iters 0: search the scales",
        ),
    )
    enable_alg_ext: bool = option(
        False,
        Spec(
            "tune the last block by what the model predicts instead of by the block's output",
            flags=("enable_alg_ext", "enable_lfq"),
            aliases=("enable_lfq",),
        ),
    )
    smooth: float | None = option(
        None,
        Spec(
            "before rounding, divide channels of inputs by part of their size and multiply the weights that "
            "read them by it; 0 for not at all, 1 for all of it; when not given 0.5 where inputs become "
            "MXFP4 or whole numbers, 0.2 where they become NVFP4, 0.25 where only weights become whole "
            "numbers of 3 or 4 bits, else and for plain rounding 0",
            low=0,
            high=1,
        ),
    )
    distill_steps: int = option(
        0,
        Spec(
            "steps of tuning all blocks together by what the model predicts, after each was tuned alone, on "
            "rows of their own; 0 for none",
            low=0,
        ),
    )
    distill_nsamples: int | None = option(
        None, Spec("rows for distill_steps; when not given as many as the steps take, each seen once", low=1)
    )
    distill_scales_only: bool = option(
        False,
        Spec(
            "distill_steps learn the scales of groups only and leave the codes: less gained, in a fraction "
            "of the memory"
        ),
    )
    distill_lr: float | None = option(
        None,
        Spec(
            "step of the rounding offsets in distill_steps, in codes; steps of ranges and norms grow and "
            "shrink with it; when not given 0.085 over the root of distill_steps, 0.006 at most",
            low=0,
        ),
    )
    enable_deterministic_algorithms: bool = option(
        False,
        Spec(
            "the same bytes for any number of processes and rows at once: rows pass one at a time, sums have "
            "a fixed order, and PyTorch takes its deterministic GPU kernels",
            flags=("enable_deterministic_algorithms", "deterministic"),
            aliases=("deterministic",),
            off=("disable_deterministic_algorithms",),
        ),
    )

    def __post_init__(self) -> None:
        settle(self)
        for name in ("lr", "minmax_lr"):
            check_step_size(name, getattr(self, name))
        if self.enable_alg_ext and not self.iters:
            raise ConfigError(
                "enable_alg_ext extends tuning, and iters 0 does not tune: leave one of them out"
            )

        if self.distill_lr is not None and not 0 < self.distill_lr < 1:
            raise ConfigError(
                f'option "distill_lr" cannot be {self.distill_lr:g}: expected codes above 0 and below 1, '
                "such as 0.006; leave it out for what suits the number of steps"
            )

    def learning_rate(self, bits: int) -> float:
        """Return the step size of the rounding offsets, in units of one code.

        With linear decay an offset can travel lr * (iters + 1) / 2 codes: half a code by default, so that
        each weight can reach either neighbour; a whole one in long runs at 2 or 3 bits. An offset whose
        gradient is noise wanders about lr * sqrt(iters / 3) codes, which is more the fewer steps there are;
        from 4 bits on, where there is less to gain, that is kept below `WANDER`.
        """
        if self.lr is not None:
            return self.lr
        if self.iters == 0:
            return 0.0
        if bits <= FEW_BITS:
            return (2.0 if self.iters >= 1000 else 1.0) / self.iters
        return min(1.0 / self.iters, WANDER * math.sqrt(3 / self.iters))
