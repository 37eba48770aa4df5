"""The main command for a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from auto_round.cli.progress import drawn_progress
from auto_round.config import Options
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.units import duration, shrinkage, size

if TYPE_CHECKING:
    from auto_round.diffusion.prepare import PipelineJob
    from auto_round.diffusion.run import PipelineResult


def quantize_pipeline(options: Options, evaluation: Mapping[str, Any]) -> None:
    """Do what the options say and print what came of it.

    Args:
        options: of the run.
        evaluation: options of an evaluation behind it that were written.

    Raises:
        AutoRoundError: the request is wrong, or the work failed.
    """
    from auto_round.diffusion.prepare import prepare_pipeline
    from auto_round.diffusion.run import run_pipeline

    if evaluation:
        names = ", ".join(f"--{name}" for name in evaluation)
        raise ConfigError(f"{names}: there are no tasks for pictures; compare them with --prompt")
    job = prepare_pipeline(options, captions=not options.output.dry_run)
    if options.output.dry_run:
        print(plan(job))
        return
    try:
        with drawn_progress() as progress:
            result = run_pipeline(job, progress)
    except KeyboardInterrupt:
        if options.output.resume:
            logger.warning("the same command continues where this run stopped (%s.partial)", job.output)
        raise
    print("\n".join(f"{name:<12}{text}" for name, text in _lines(result)))


def plan(job: PipelineJob) -> str:
    """What a run would do, for people."""
    from auto_round.pipeline.deciding.plan_table import plan_table

    parts = [f"{name}:\n{plan_table(part)}" for name, part in job.jobs.items()]
    kept = job.options.diffusion.steps_per_caption or job.call.steps
    drawn = f"{job.call.steps} steps a caption, of which {min(kept, job.call.steps)} are tuned on"
    drawn = drawn if job.denoises else "captions are read, nothing is denoised"
    folders = ", ".join(map(str, job.folders(job.output).values()))
    return "\n".join(
        [*parts, "", f"method:  {job.method.sentence}", f"drawing: {drawn}", f"output:  {folders}"]
    )


def _lines(result: PipelineResult) -> Iterator[tuple[str, str]]:
    report = result.report
    for folder in result.folders:
        yield "written", str(folder)
    for name, part in report["components"].items():
        before = part["bytes_before"]
        for form, after in part["bytes_after"].items():
            yield name, f"{form}: {size(before)} -> {size(after)} ({shrinkage(before, after)})"
        if (held := part.get("held_out")) is not None:
            yield (
                "quality",
                f"{held['relative_error']:.3g} of the square of what it predicts, held-out captions",
            )
        else:
            yield "quality", "not measured: no captions are held out"
    if (shown := report.get("pictures")) is not None:
        yield (
            "pictures",
            f"PSNR {shown['psnr']:.4g} dB, SSIM {shown['ssim']:.4g}, latents {shown['latent_error']:.3g}",
        )
        for name, scores in shown["metrics"].items():
            yield name, f"{scores['original']:.4g} -> {scores['quantized']:.4g}"
        yield "sheet", str(shown["sheet"])
    yield "took", f"{duration(result.seconds)}, peak memory {size(result.peak_bytes)}"
