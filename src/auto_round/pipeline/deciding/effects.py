"""Options that have no effect on a run although the user set them: each is named with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from auto_round.config.option import settings
from auto_round.config.options import GROUPS, Options
from auto_round.pipeline.deciding.job import Job


@dataclass(frozen=True, slots=True)
class Idle:
    """Options that do nothing in some runs.

    Attributes:
        names: the options.
        why: the reason, as the end of "NAME has no effect: ".
        where: whether it is so in a run.
    """

    names: tuple[str, ...]
    why: str
    where: Callable[[Job], bool]


def _rounds(job: Job) -> bool:
    return job.tune.iters == 0


def _needs_no_rows(job: Job) -> bool:
    return not job.tune.needs_rows


def _has_no_rows(job: Job) -> bool:
    return _needs_no_rows(job) and job.rows is None and "dataset" not in job.options.given


def _on_cpu(job: Job) -> bool:
    return job.device.type == "cpu"


IDLE: Final = (
    Idle(
        (
            "lr",
            "minmax_lr",
            "lr_scheduler",
            "momentum",
            "enable_adam",
            "enable_minmax_tuning",
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "gradient_accumulate_steps",
            "nblocks",
            "not_use_best_mse",
            "dynamic_max_gap",
            "enable_torch_compile",
        ),
        "iters 0 rounds without tuning",
        _rounds,
    ),
    Idle(("momentum",), "Adam has its own", lambda job: job.options.tune.enable_adam),
    Idle(
        ("minmax_lr",),
        "ranges are not tuned (enable_minmax_tuning is off)",
        lambda job: not job.tune.tune_range,
    ),
    Idle(
        ("disable_opt_rtn",),
        "it says how iters 0 rounds; tuning always begins with searched ranges",
        lambda job: not _rounds(job),
    ),
    Idle(("nsamples",), "plain rounding needs no data", _needs_no_rows),
    Idle(("batch_size", "seqlen", "seed", "amp"), "plain rounding runs no block", _has_no_rows),
    Idle(
        ("tokenizer",),
        "nothing is tokenized, and the folder gets the tokenizer files of the model",
        lambda job: _has_no_rows(job) and all(e.file is None for e in job.exporters.values()),
    ),
    Idle(("enable_deterministic_algorithms",), "runs on a CPU are deterministic anyway", _on_cpu),
    Idle(("low_gpu_mem_usage",), "blocks are tuned on the CPU", _on_cpu),
    Idle(
        ("act_group_size", "act_sym", "act_data_type", "act_dynamic"),
        "activations are not quantized (--act_bits 8, or a scheme such as INT8)",
        lambda job: not job.plan.scheme.act_quantized,
    ),
    Idle(("platform",), "the model is a folder and the data need no hub", lambda job: _is_local(job)),
)
"""One row for each reason; formats add their own (`Exporter.idle`)."""


def _is_local(job: Job) -> bool:
    folder = job.source.folder
    return _has_no_rows(job) and folder is not None and str(folder) == job.options.model.model


def idle_options(job: Job) -> list[str]:
    """One sentence for each reason, with the options that the user changed and that have no effect for it."""
    changed = set(_changed(job.options))
    said: dict[str, str] = {}
    for row in IDLE:
        if row.where(job):
            said.update((name, row.why) for name in row.names if name in changed and name not in said)
    for exporter in job.exporters.values():
        said.update((n, why) for n, why in exporter.idle.items() if n in changed and n not in said)
    reasons: dict[str, list[str]] = {}
    for name, why in said.items():
        reasons.setdefault(why, []).append(name)
    return [
        f"{', '.join(names)} ha{'s' if len(names) == 1 else 've'} no effect: {why}"
        for why, names in reasons.items()
    ]


def _changed(options: Options) -> Iterator[str]:
    """Options that the user set to another value than the default."""
    for key, group in GROUPS.items():
        values: Any = getattr(options, key)
        default = {f.name: f.default for f in dataclasses.fields(group)}
        for setting in settings(group):
            name = setting.name
            if name in options.given and getattr(values, name) != setting.admit(default[name]):
                yield name
