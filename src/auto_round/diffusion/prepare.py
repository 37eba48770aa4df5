"""From options to the job of a pipeline: everything that can be refused is refused here, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auto_round.checkpoint.shards import DIFFUSERS, TRANSFORMERS
from auto_round.config import DiffusionOptions, Options
from auto_round.diffusion.captions import check_captions, of_file, read_captions
from auto_round.diffusion.drawing import Call, settle_call
from auto_round.diffusion.metrics import refuse_metrics
from auto_round.diffusion.sheet import require_pillow
from auto_round.errors import CannotHoldError, CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.export.table import EXPORTERS
from auto_round.log import logger
from auto_round.models.component import ComponentSource, refuse_unknown
from auto_round.models.encoder import EncoderSource, refuse_textless
from auto_round.models.hub import resolve_pipeline
from auto_round.models.pipeline_folder import DENOISERS, PipelineFolder
from auto_round.models.replayed_source import ReplayedSource
from auto_round.pipeline.deciding.decide import Decided, decide
from auto_round.pipeline.deciding.fetch_rows import held_out_rows, tuned_of
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.method import Method, method_of
from auto_round.pipeline.deciding.open_model import Opened
from auto_round.pipeline.deciding.request import Request, make_request
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.machine.memory import keep_few_products
from auto_round.ranks.place import place
from auto_round.schemes.float_types import FLOAT_TYPES
from auto_round.schemes.scheme import parse_scheme

FORMATS = ("auto_round", "fake")
"""Formats whose folders diffusers loads: its AutoRound quantizer, and plain weights."""

_OF_TEXT = {
    "enable_alg_ext": "a denoiser has no predictions of tokens",
    "distill_steps": "a denoiser has no predictions of tokens",
    "quant_lm_head": "there is no output head",
    "static_kv_dtype": "there is no key/value cache",
    "static_attention_dtype": "its attention has no scales",
    "avg_bits": "schemes are not chosen for pipelines yet",
    "imatrix": "it is a file about text",
    "save_imatrix": "it is a file about text",
}
"""Options that say nothing for a pipeline, and why."""


@dataclass(frozen=True, slots=True)
class PipelineJob:
    """One run over a pipeline, ready to start.

    Attributes:
        options: what the user asked for.
        pipeline: the folder.
        call: how it draws.
        jobs: component -> its own job, without rows; its source is a `ReplayedSource`.
        captions: to calibrate on, those that are held out last; none for plain rounding.
        tuned: how many of them are tuned on.
        prompts: captions of pictures to compare.
        output: folder of the result.
    """

    options: Options
    pipeline: PipelineFolder
    call: Call
    jobs: Mapping[str, Job]
    captions: tuple[str, ...]
    tuned: int
    prompts: tuple[str, ...]
    output: Path

    def source(self, component: str) -> ReplayedSource:
        """The component, read block by block."""
        source = self.jobs[component].source
        if not isinstance(source, ReplayedSource):
            raise TypeError(component)
        return source

    @property
    def denoises(self) -> bool:
        """Some component is called at every denoising step; False where all of them read captions."""
        return any(isinstance(job.source, ComponentSource) for job in self.jobs.values())

    @property
    def first(self) -> Job:
        """The job of the first component."""
        return next(iter(self.jobs.values()))

    @property
    def method(self) -> Method:
        """How the components are quantized, in words."""
        tune = self.first.tune
        return method_of(self.options, tune, with_rows=tune.needs_rows)

    def folders(self, root: Path) -> dict[str, Path]:
        """Folder of each output format under `root`, each a whole pipeline."""
        return self.first.folders(root)

    def close(self) -> None:
        """Close the files of all components."""
        for name in self.jobs:
            self.source(name).close()


@plain_device()
def prepare_pipeline(
    options: Options,
    *,
    folder: Path | None = None,
    dataset: Iterable[Any] | None = None,
    output: Path | None = None,
    captions: bool = True,
) -> PipelineJob:
    """Decide everything that can be decided without reading weights.

    Args:
        options: what the user asked for.
        folder: the pipeline; None for the one that `options` name.
        dataset: captions as Python objects instead of `options.calibration.dataset`.
        output: final folder; None for `options.output.output_dir`.
        captions: read the captions; a dry run does without.

    Raises:
        AutoRoundError: anything that would make the run fail later, as far as it can be known.
    """
    _refuse_options(options)
    pipeline = PipelineFolder.open(folder or resolve_pipeline(options.model.model, options.model.platform))
    call = settle_call(options, pipeline)
    prompts = _prompts(options.diffusion)
    _refuse_places(options, pipeline, drawn=bool(prompts))
    refuse_metrics(options.diffusion.metrics, drawn=bool(prompts))
    if dataset is None:
        check_captions(options.calibration.dataset)
    request = make_request(options, dataset=() if dataset is None else dataset, output=output)
    refused = [e.name for e in request.formats if e.name.partition(":")[0] not in FORMATS]
    if refused:
        why = [Refusal(name, "diffusers does not load it", f"use {' or '.join(FORMATS)}") for name in refused]
        raise UnsupportedError("a pipeline cannot be written as asked", why)
    request = replace(request, options=_lasting(request.options))
    jobs: dict[str, Job] = {}
    try:
        for name in _components(options.diffusion, pipeline):
            jobs[name] = _job(request, _open(pipeline, name))
    except BaseException:
        for job in jobs.values():
            _close(job)
        raise
    needed = captions and any(job.tune.needs_rows for job in jobs.values())
    given = options.calibration.dataset if dataset is None else dataset
    wanted = options.calibration.nsamples
    texts = read_captions(given, wanted + held_out_rows(wanted), options.calibration.seed) if needed else []
    return PipelineJob(
        options=options,
        pipeline=pipeline,
        call=call,
        jobs=jobs,
        captions=tuple(texts),
        # Steps of a single caption are shared out.
        tuned=len(texts) if len(texts) < 2 else tuned_of(len(texts), wanted),
        prompts=prompts,
        output=request.output,
    )


def _lasting(options: Options) -> Options:
    """The options with steps in bfloat16 where the user names no dtype.

    diffusers casts scales to the dtype that a pipeline is loaded in, as a rule bfloat16; float16 would lose
    bits there, and the weights would no longer be those that were tuned. Steps of floating numbers are in the
    dtype of the model, in which their readers compute.
    """
    scheme = parse_scheme(options.scheme.scheme, options.scheme.overrides())
    if options.scheme.scale_dtype is not None or scheme.data_type in FLOAT_TYPES:
        return options
    return replace(options, scheme=replace(options.scheme, scale_dtype="bfloat16"))


def _refuse_options(options: Options) -> None:
    """Refuse options that mean text.

    Raises:
        ConfigError: they are given.
    """
    for name, why in _OF_TEXT.items():
        if name in options.given:
            raise ConfigError(f"{name} means nothing for a pipeline of diffusers: {why}; leave it out")
    if place() is not None:
        raise UnsupportedError(
            "a pipeline of diffusers is made small by one process: start it without torchrun"
        )
    if options.auto.asked:
        raise UnsupportedError("AutoScheme does not choose schemes for pipelines of diffusers yet")


def _refuse_places(options: Options, pipeline: PipelineFolder, *, drawn: bool) -> None:
    """Refuse folders that cannot be read or written.

    Raises:
        CheckpointError: a component of the pipeline is not there.
        ConfigError: pictures cannot be written, or nobody asks for any.
    """
    absent = [name for name in pipeline.components if not (pipeline.folder / name).is_dir()]
    if absent:
        raise CheckpointError(
            f"{pipeline.folder}: its index names components that are not there: {', '.join(absent)}"
        )
    if drawn:
        require_pillow()
    if options.diffusion.image_save_dir is None:
        return
    if not drawn:
        raise ConfigError("image_save_dir is for pictures: say what to draw with --prompt or --prompt_file")
    place = Path(options.diffusion.image_save_dir).expanduser()
    in_the_way = next((p for p in (place, *place.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise ConfigError(f"image_save_dir {place}: {in_the_way} is a file, expected a folder")


def _components(wanted: DiffusionOptions, pipeline: PipelineFolder) -> tuple[str, ...]:
    """Components to make small.

    Raises:
        ConfigError: there is no such component.
        UnsupportedError: nothing is known of the blocks of one of them, or the pipeline has none.
    """
    names = wanted.components or tuple(name for name in DENOISERS if name in pipeline.components)
    if not names:
        have = ", ".join(f"{name} ({kind})" for name, (_, kind) in pipeline.components.items())
        raise UnsupportedError(
            f"{pipeline.class_name} has no transformer and no U-Net",
            [Refusal("diffusion", f"its components are {have}", "name some with --components")],
        )
    for name in names:
        kind = pipeline.kind(name)
        if pipeline.is_encoder(name):
            refuse_textless(kind)
        else:
            refuse_unknown(kind.__name__)
    return tuple(dict.fromkeys(names))


def _open(pipeline: PipelineFolder, name: str) -> ReplayedSource:
    """A component without its weights."""
    folder, kind = pipeline.folder / name, pipeline.kind(name)
    if pipeline.is_encoder(name):
        return EncoderSource.of_kind(folder, kind)
    return ComponentSource.open(folder, kind)


def _job(request: Request, source: ReplayedSource) -> Job:
    """The job of one component."""
    opened = Opened(request.options, source, None)
    try:
        decided = _decide(request, opened)
        if decided.tune.needs_rows:
            traceable = source.refuse_untraceable(dtype=decided.dtype, device=request.device)
            decided = replace(decided, dtype=traceable.dtype)
    except BaseException:
        source.close()
        raise
    keep_few_products(request.device, decided.dtype)
    for exporter in decided.exporters.values():
        for note in exporter.warnings(decided.plan, source.layers):
            logger.debug(note)
    return Job(
        options=request.options,
        source=source,
        tokenizer=None,
        plan=decided.plan,
        exporters=decided.exporters,
        rows=None,
        tuned=0,
        tune=decided.tune,
        device=request.device,
        dtype=decided.dtype,
        output=request.output,
        placement=decided.placement,
        files=TRANSFORMERS if isinstance(source, EncoderSource) else DIFFUSERS,
    )


def _decide(request: Request, opened: Opened) -> Decided:
    """What becomes of the layers of a component.

    Raises:
        UnsupportedError: no format holds it; of other formats, those that pipelines can have are named.
    """
    try:
        return decide(request, opened)
    except CannotHoldError as error:
        asked = [exporter.name for exporter in request.formats]
        able = [name for name in FORMATS if name not in asked and _holds(name, request, opened)]
        others = f"; formats that can: {', '.join(able)}" if able else ""
        raise UnsupportedError(f"this plan cannot be written as asked{others}", error.refusals) from error


def _holds(name: str, request: Request, opened: Opened) -> bool:
    try:
        decide(replace(request, formats=(EXPORTERS[name],)), opened, quiet=True)
    except UnsupportedError:
        return False
    return True


def _close(job: Job) -> None:
    if isinstance(job.source, ReplayedSource):
        job.source.close()


def _prompts(wanted: DiffusionOptions) -> tuple[str, ...]:
    """Captions of the pictures to compare."""
    if wanted.prompt is not None and wanted.prompt_file is not None:
        raise ConfigError("prompt and prompt_file both say what to draw: give one of them")
    if wanted.prompt_file is not None:
        return tuple(of_file(Path(wanted.prompt_file).expanduser()))
    if wanted.prompt is not None and not wanted.prompt.strip():
        raise ConfigError("prompt is empty: say what to draw")
    return () if wanted.prompt is None else (wanted.prompt,)
