"""Pictures of the original and of the quantized pipeline, from the same captions and noise, compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.checkpoint.disk import writing
from auto_round.diffusion.drawing import Drawing, as_tensor
from auto_round.diffusion.likeness import psnr, ssim
from auto_round.diffusion.metrics import judged
from auto_round.diffusion.original import original
from auto_round.diffusion.prepare import PipelineJob
from auto_round.diffusion.sheet import write_pictures, write_sheet
from auto_round.log import ProgressSink
from auto_round.models.pipeline_folder import PipelineFolder
from auto_round.pipeline.machine.clock import Clock

PICTURES, SHEET = "pictures", "sheet.png"


@dataclass(frozen=True, slots=True)
class Shown:
    """How far the pictures of two pipelines are from each other.

    Attributes:
        pictures: how many were compared.
        latent_error: squared difference of the last latents over their square.
        psnr: mean over pictures, dB.
        ssim: mean over pictures.
        each: caption, psnr and ssim of every picture.
        sheet: file of the picture sheet, relative to the output.
        metrics: metric -> mean score of the original's pictures and of the result's.
    """

    pictures: int
    latent_error: float
    psnr: float
    ssim: float
    each: Sequence[Mapping[str, Any]]
    sheet: str
    metrics: Mapping[str, Mapping[str, float]]


def compare_pictures(
    job: PipelineJob, folders: Mapping[str, Path], progress: ProgressSink, clock: Clock
) -> Shown:
    """Draw the captions twice, write the pictures, and say how alike they are.

    Args:
        job: the run; its first format is compared.
        folders: what was written.
        progress: receives events.
        clock: of the run.
    """
    first, count = job.first, len(job.prompts)
    with ExitStack() as stack:
        parts = {name: stack.enter_context(original(job, name)) for name in job.jobs}
        before = _drawn(job.call.on(job.pipeline.load(first.dtype, first.device, parts)), job.prompts)
        del parts
    progress(clock.event("show", 1, 2, f"{count} pictures of the original"))
    folder = next(iter(folders.values()))
    quantized = PipelineFolder.open(folder).load(first.dtype, first.device)
    after = _drawn(job.call.on(quantized), job.prompts)
    progress(clock.event("show", 2, 2, f"{count} pictures of the result"))
    where = job.options.diffusion.image_save_dir
    place = folder / PICTURES if where is None else Path(where).expanduser()
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    write_pictures(place, "original", before.pictures)
    write_pictures(place, "quantized", after.pictures)
    write_sheet(place / SHEET, job.prompts, before.pictures, after.pictures)
    clock.lap("show")
    sheet = f"{PICTURES}/{SHEET}" if where is None else str(place / SHEET)
    asked = job.options.diffusion.metrics
    scores = [judged(asked, job.prompts, drawn.pictures) for drawn in (before, after)]
    metrics = {name: {"original": scores[0][name], "quantized": scores[1][name]} for name in asked}
    return _compared(job.prompts, before, after, sheet, metrics)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Last latents, and pictures `[captions, height, width, 3]` from 0 to 1."""

    latents: Tensor
    pictures: Tensor


def _drawn(drawing: Drawing, captions: Sequence[str]) -> _Drawn:
    latents, pictures = [], []
    for first in range(0, len(captions), drawing.at_once):
        some = captions[first : first + drawing.at_once]
        latents.append(as_tensor(drawing.latents(some, first)))
        pictures.append(stills(drawing.pictures(some, first)))
    return _Drawn(torch.cat(latents), torch.cat(pictures))


def stills(drawn: Any) -> Tensor:
    """Pictures of a call, `[captions, height, width, 3]`; of videos the middle frame."""
    found = torch.as_tensor(drawn, device="cpu").float()
    return found[:, found.shape[1] // 2] if found.dim() == 5 else found


def _compared(
    captions: Sequence[str],
    before: _Drawn,
    after: _Drawn,
    sheet: str,
    metrics: Mapping[str, Mapping[str, float]],
) -> Shown:
    each: list[dict[str, Any]] = [
        {"caption": caption, "psnr": psnr(a, b), "ssim": ssim(a, b)}
        for caption, a, b in zip(captions, before.pictures, after.pictures, strict=True)
    ]
    error = float((after.latents - before.latents).square().sum() / before.latents.square().sum())
    return Shown(
        pictures=len(each),
        latent_error=error,
        psnr=_mean(entry["psnr"] for entry in each),
        ssim=_mean(entry["ssim"] for entry in each),
        each=each,
        sheet=sheet,
        metrics=metrics,
    )


def _mean(values: Iterable[float]) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else math.inf
