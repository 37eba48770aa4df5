"""Pipelines of diffusers: `AutoRound` hands them on to here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.autoround.scratch import scratch_folder
from auto_round.config import Options
from auto_round.log import ProgressSink

if TYPE_CHECKING:
    from auto_round.diffusion.run import PipelineResult


def is_live_pipeline(model: Any) -> bool:
    """Whether an object is a pipeline of diffusers; nothing is imported to find out."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(model).__mro__)


def quantize_pipeline(
    options: Options, pipeline: Any, dataset: Iterable[Any] | None, progress: ProgressSink
) -> PipelineResult:
    """Quantize a pipeline and write it.

    Args:
        options: what to do.
        pipeline: one in memory, which is saved to a folder first; None for the one that `options` name.
        dataset: captions as Python objects; None for those that `options` name.
        progress: receives events.
    """
    from auto_round.diffusion.prepare import prepare_pipeline
    from auto_round.diffusion.run import run_pipeline
    from auto_round.models.pipeline_folder import quiet_diffusers

    with scratch_folder() as scratch:
        folder = None
        if pipeline is not None:
            folder = Path(scratch) / type(pipeline).__name__
            with quiet_diffusers():
                pipeline.save_pretrained(folder)
        output = Path(options.output.output_dir)
        return run_pipeline(
            prepare_pipeline(options, folder=folder, dataset=dataset, output=output), progress
        )


def load_pipeline(folder: Path) -> Any:
    """The pipeline of a folder, in the dtype of its files."""
    from auto_round.models.pipeline_folder import quiet_diffusers, require_diffusers

    with quiet_diffusers():
        return require_diffusers().DiffusionPipeline.from_pretrained(folder, local_files_only=True)
