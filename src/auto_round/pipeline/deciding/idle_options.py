"""Options that have no effect on a run although the user set them: each is named with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from auto_round.config.diffusion import DiffusionOptions
from auto_round.config.option import settings
from auto_round.config.options import GROUPS, Options
from auto_round.export.exporter import Exporter
from auto_round.ranks.place import place
from auto_round.tuning.config import TuneConfig


@dataclass(frozen=True, slots=True)
class Settled:
    """What was decided of a run, as far as options can lose their effect by it.

    Attributes:
        options: what the user asked for, whatever became of it.
        tune: settings of the tuning loop.
        exporters: formats that are written.
        rounds: some layer, or what attention keeps, is rounded.
        has_rows: some calibration rows are there.
        has_images: some of them have images.
        has_experts: the model sends tokens to some of its experts.
        quantizes_inputs: inputs of layers are quantized.
        on_cpu: blocks are tuned on the CPU.
        folder: where the model lies; None for one in memory.
    """

    options: Options
    tune: TuneConfig
    exporters: Collection[Exporter]
    rounds: bool
    has_rows: bool
    has_images: bool
    has_experts: bool
    quantizes_inputs: bool
    on_cpu: bool
    folder: Path | None


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
    where: Callable[[Settled], bool]


def _tunes_nothing(run: Settled) -> bool:
    asked = run.options.tune
    return not run.rounds and (asked.iters > 0 or asked.distill_steps > 0)


def _without_tuning(run: Settled) -> bool:
    return run.tune.iters == 0


def _needs_no_rows(run: Settled) -> bool:
    return not run.tune.needs_rows


def _has_no_rows(run: Settled) -> bool:
    return _needs_no_rows(run) and not run.has_rows and "dataset" not in run.options.given


def _on_cpu(run: Settled) -> bool:
    return run.on_cpu


OF_STEPS: Final = (
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
)
"""Options of tuning each block."""
OF_STEPS_TOGETHER: Final = ("distill_nsamples", "distill_lr", "distill_scales_only")
"""Options of tuning all blocks together."""

IDLE: Final = (
    Idle(
        ("iters", "distill_steps", *OF_STEPS, *OF_STEPS_TOGETHER),
        "no layer is rounded, so nothing is tuned",
        _tunes_nothing,
    ),
    Idle(OF_STEPS, "iters 0 rounds without tuning", _without_tuning),
    Idle(("momentum",), "Adam has its own", lambda run: run.options.tune.enable_adam),
    Idle(
        ("minmax_lr",),
        "ranges are not tuned (enable_minmax_tuning is off)",
        lambda run: not run.tune.tune_range,
    ),
    Idle(
        ("disable_opt_rtn",),
        "it says how iters 0 rounds; tuning always begins with searched ranges",
        lambda run: not _without_tuning(run),
    ),
    Idle(
        OF_STEPS_TOGETHER,
        "blocks are not tuned together (--distill_steps 300)",
        lambda run: not run.options.tune.distill_steps,
    ),
    Idle(("memory", "targets_ahead"), "plain rounding holds a few matrices at a time", _needs_no_rows),
    Idle(("nsamples", "expert_rows", "smooth"), "plain rounding needs no data", _needs_no_rows),
    Idle(("expert_rows",), "the model sends tokens to no experts", lambda run: not run.has_experts),
    Idle(
        ("processor", "image_processor", "extra_data_dir", "template"),
        "no calibration row has an image",
        lambda settled: not settled.has_images,
    ),
    Idle(("batch_size", "seqlen", "seed", "amp"), "plain rounding runs no block", _has_no_rows),
    Idle(
        ("tokenizer",),
        "nothing is tokenized, and the folder gets the tokenizer files of the model",
        lambda run: _has_no_rows(run) and all(e.file is None for e in run.exporters),
    ),
    Idle(("enable_deterministic_algorithms",), "rounding without data adds up no rows", _has_no_rows),
    Idle(("low_gpu_mem_usage",), "blocks are tuned on the CPU", _on_cpu),
    Idle(
        ("act_group_size", "act_sym", "act_data_type", "act_dynamic"),
        "activations are not quantized (--act_bits 8, or a scheme such as INT8)",
        lambda run: not run.quantizes_inputs,
    ),
    Idle(
        ("act_percentile",),
        "no activation scale is fixed at calibration (--disable_act_dynamic, or a scheme such as FP8_STATIC)",
        lambda run: not run.tune.ranges,
    ),
    Idle(
        (
            "ignore_scale_zp_bits",
            "score_method",
            "score_nsamples",
            "score_seqlen",
            "score_batch_size",
            "score_dataset",
            "score_device_map",
            "score_low_gpu_mem_usage",
        ),
        "no schemes are chosen (--avg_bits 4 --options W2A16,W4A16,W8A16)",
        lambda run: run.options.chosen is None,
    ),
    Idle(("dist_backend",), "one process does all (torchrun starts several)", lambda run: place() is None),
    Idle(
        tuple(setting.name for setting in settings(DiffusionOptions)),
        "it is for pipelines of diffusers, and this is a model",
        lambda _: True,
    ),
    Idle(("platform",), "the model is a folder and the data need no hub", lambda run: _is_local(run)),
)
"""One row for each reason; formats add their own (`Exporter.idle`)."""


def _is_local(run: Settled) -> bool:
    return _has_no_rows(run) and run.folder == Path(run.options.model.model).expanduser()


def idle_options(run: Settled) -> list[str]:
    """One sentence for each reason, with the options that the user changed and that have no effect for it."""
    changed = set(_changed(run.options))
    said: dict[str, str] = {}
    for row in IDLE:
        if row.where(run):
            said.update((name, row.why) for name in row.names if name in changed and name not in said)
    for exporter in run.exporters:
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
