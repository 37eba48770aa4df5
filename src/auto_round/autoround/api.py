"""AutoRound: the user's class. It turns arguments into options and hands them to the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from auto_round.autoround.attributes import Attributes, Done, layer_schemes
from auto_round.autoround.auto_scheme import AutoScheme
from auto_round.autoround.finished import Finished
from auto_round.autoround.located import located
from auto_round.autoround.parameters import (
    collect,
    is_name,
    live_processor,
    make_documentation,
    make_signature,
    read_arguments,
    refuse_other_things,
)
from auto_round.autoround.pipelines import is_live_pipeline, load_pipeline, quantize_pipeline
from auto_round.autoround.saved import Saved
from auto_round.autoround.scratch import scratch_folder
from auto_round.autoround.usual_format import usual_or_rounded
from auto_round.collector import quiet_collector
from auto_round.config import Options, OutputOptions
from auto_round.config.values import FROM_PYTHON
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.log import ProgressSink, ignore_progress, logger

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from auto_round.facts.flow import States
    from auto_round.pipeline.deciding.job import Job


class AutoRound(Attributes):
    """Makes a language model, or the transformer of a diffusers pipeline, small.

        AutoRound("path/or/hub-name", scheme="W4A16").quantize_and_save("out", format="auto_round")

    Args:
        model: folder or hub name, or a Transformers model or diffusers pipeline in memory (left as it is).
        tokenizer: folder or hub name, or a tokenizer; a model in memory needs it unless `dataset` is tokens.
        positional: further arguments in the order of the signature.
        recipe: "default", "best", "light", "distill", "rtn" or "opt_rtn": other defaults for some arguments.
        progress: called with a `Progress` event whenever a piece of work is done.
        named: the arguments below.

    A scheme may also be a dict of its fields or a `QuantizationScheme`; `dataset` a list of texts, token ids
    or dicts, or a DataLoader. Unknown arguments raise `ConfigError` with the nearest names.

    Every argument can be read as an attribute. Fields of the scheme (`bits`, `group_size`, `sym`, ...),
    `layer_config` and `model` tell what is in force: what was given before a run, what came of it after.
    """

    __doc__ = f"{__doc__}{make_documentation()}"
    __signature__ = make_signature()

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: Any = None,
        *positional: Any,
        recipe: str = "default",
        progress: ProgressSink | None = None,
        **named: Any,
    ) -> None:
        given = collect(positional, named)
        self._dataset = _live(given.get("dataset"))
        self._score_dataset = (
            _live(scheme.dataset) if isinstance(scheme := given.get("scheme"), AutoScheme) else None
        )
        if self._dataset is not None:
            given["dataset"] = f"{type(self._dataset).__name__} {FROM_PYTHON}"
        refuse_other_things(model, tokenizer)
        self._model, self._tokenizer = _live(model), _live(tokenizer)
        self._processor = live_processor(given)
        alone = self._model is not None and tokenizer is None and self._dataset is None
        if alone and not is_live_pipeline(self._model):
            raise ConfigError("a model in memory needs its tokenizer: AutoRound(model, tokenizer, ...)")
        name = str(model) if self._model is None else type(model).__name__
        given |= {"model": name, "tokenizer": tokenizer if self._tokenizer is None else None}
        self.options = located(read_arguments(given, recipe))
        self._progress = progress or ignore_progress
        self._finished: Finished | None = None

    @quiet_collector()
    def quantize(self) -> tuple[Any, dict[str, dict[str, Any]]]:
        """Quantize; `save_quantized` can then write the result, more than once.

        The result lies in a scratch folder, which is deleted with this object. Where nobody chose a format
        and the usual one cannot hold the plan, it is a model of rounded weights, and a warning says so.

        Returns:
            The quantized model, ready to run, and the scheme of every quantized layer by name. Of a GGUF
            scheme it is the model with rounded weights.

        Raises:
            AutoRoundError: the request is wrong, the work failed, or the chosen format cannot hold the plan.
        """
        from auto_round.export.table import settle_formats, takes_any_plan
        from auto_round.pipeline.machine.clock import Clock
        from auto_round.pipeline.quantize import run_job

        if self._is_pipeline:
            raise UnsupportedError("a pipeline of diffusers is written at once: call quantize_and_save()")
        auto = self.options.auto
        if (targets := len(auto.avg_bits) + len(auto.target_size)) > 1:
            raise ConfigError(
                f"quantize() makes one model, and {targets} targets are given: give one, or call "
                "quantize_and_save(), which writes an output for each"
            )
        scratch = scratch_folder()
        asked = replace(self.options, output=self._output(Path(scratch.name) / "model", None))
        (options,) = usual_or_rounded(asked, self._choices)

        def wanted(options: Options) -> Job:
            formats = options.output.formats
            decides = next((name for name in formats if not takes_any_plan(name)), formats[0])
            output = self._output(Path(scratch.name) / "model", decides)
            settled, (exporter, *_) = settle_formats(replace(options, output=output))
            if exporter.library != "transformers":  # rounded weights beside it are for PyTorch
                output = replace(settled.output, format=f"{exporter.name},fake")
            return self._prepare(replace(settled, output=output), rows=True)  # what gives way is said once

        job = usual_or_rounded(options, wanted)
        result = run_job(job, self._progress, Clock())
        self._finished = Finished(scratch, job, result, options)
        self._done = Done(result.plan, result.folders[-1])
        return self._remember(self._read(result.folders[-1])), layer_schemes(result.plan)

    def save_quantized(
        self,
        output_dir: str | Path | None = None,
        format: str | None = None,
        inplace: bool | None = None,
        *,
        overwrite: bool | None = None,
    ) -> list[Path]:
        """Write what `quantize()` made.

        Args:
            output_dir: where to; the constructor's (`tmp_autoround`) when not given. Several formats get a
                sub-folder each.
            format: comma list of formats; the constructor's when not given, else that of `quantize()`.
            inplace: True is answered by a warning: the model in memory always stays as it is.
            overwrite: write again what is there already; the constructor's when not given.

        Returns:
            The folder of each format.

        Raises:
            ConfigError: `quantize()` was not called, or the folder holds something else.
            UnsupportedError: a format cannot hold the plan that `quantize()` made.
        """
        from auto_round.autoround.rewrite import copy_files, rewrite
        from auto_round.export.table import settle_formats

        done = self._finished
        if done is None:
            raise ConfigError("nothing to save yet: call quantize() first, or quantize_and_save() instead")
        _say_what_stays(inplace)
        output = self._output(output_dir, format, overwrite)
        if format is not None:
            done.refuse_other_plans(output.formats)
        chosen = replace(
            self.options,
            scheme=done.asked.scheme,
            auto=done.asked.auto,
            chosen=done.asked.chosen,
            chosen_layers=done.asked.chosen_layers,
        )
        settled, asked = settle_formats(replace(chosen, output=output))
        if all(exporter.planner is None for exporter in asked):
            job = self._prepare(replace(chosen, output=output), rows=False)
        else:
            job = replace(done.job, output=Path(output.output_dir), options=settled)
            job = replace(job, exporters={e.name: job.exporters[e.name] for e in asked})
        job = replace(job, rows=done.job.rows, tuned=done.job.tuned)
        finished = dict(zip(done.job.exporters, done.result.folders, strict=True))
        if done.planned_by is not None or all(e.any_plan and e.name in finished for e in asked):
            return copy_files(job, finished, done.result)
        done.refuse_other_schemes(job.plan, output.formats)
        return rewrite(job, done.result.folders[0], done.result.report)

    @quiet_collector()
    def quantize_and_save(
        self,
        output_dir: str | Path | None = None,
        format: str | None = None,
        inplace: bool | None = None,
        *,
        load: bool = True,
        overwrite: bool | None = None,
    ) -> tuple[Any, list[Path]]:
        """Quantize and write block by block; the whole model is never in memory while it works.

        What is there already from the same settings is not made again. An older output in the folder goes
        away once the new one is complete; a folder that holds something else is refused.

        Args:
            output_dir: where to; the constructor's (`tmp_autoround`) when not given. Several formats get a
                sub-folder each.
            format: comma list of formats; the constructor's (`auto_round`) when not given.
            inplace: True is answered by a warning: the model in memory always stays as it is.
            load: return the quantized model, which is read back when it is looked at; GGUF files are not.
            overwrite: do the work again when it is done already; the constructor's when not given.

        Returns:
            The quantized model, or pipeline, from the last folder (None with `load=False`), and the folder of
            each format.

        Raises:
            AutoRoundError: the request is wrong, or the work failed.
        """
        from auto_round.pipeline.machine.clock import Clock
        from auto_round.pipeline.processes import chosen, joined, shared
        from auto_round.pipeline.quantize import run_job
        from auto_round.pipeline.separate_runs import runs_of

        clock = Clock()
        _say_what_stays(inplace)
        asked = replace(self.options, output=self._output(output_dir, format, overwrite))
        if self._is_pipeline:
            made = quantize_pipeline(asked, self._model, self._dataset, self._progress)
            read = partial(load_pipeline, made.folders[-1].absolute()) if load else None
            return Saved(read, list(made.folders))
        with joined(asked) as (ranks, options):
            runs = [part for wanted in chosen(options, ranks, self._choices) for part in runs_of(wanted)]
            jobs = [shared(self._prepare(part, rows=True), ranks) for part in runs]
            results = []
            for job in jobs:
                results.append(run_job(job, ignore_progress if ranks.rank else self._progress, clock))
                clock = Clock()
        folders = [folder for result in results for folder in result.folders]
        exporters = [exporter for job in jobs for exporter in job.exporters.values()]
        models = [folder for folder, e in zip(folders, exporters, strict=True) if e.file is None]
        self._done = done = Done(results[-1].plan, models[-1].absolute() if models else None)
        self._seen = None
        return Saved(partial(self._result_of, done) if load else None, folders)

    def quantize_block(
        self,
        block: nn.Module,
        inputs: Sequence[Any] | Tensor,
        q_input: Sequence[Tensor | States] | Tensor | None = None,
        device: str | torch.device = "cpu",
        auto_offload: bool = True,
    ) -> tuple[Tensor | States, Tensor | States]:
        """Quantize one block that somebody else runs, in place: its weights become the rounded values.

        Args:
            block: any module called as `block(hidden, *args, **kwargs)`.
            inputs: calls of the block, each `(args, kwargs)` or `((args, kwargs), ...)` as hooks record them,
                or hidden states alone, `[samples, length, hidden]`.
            q_input: hidden states after the quantized blocks before this one; `inputs` when not given.
            device: where to tune.
            auto_offload: move the block to `device` for the work and back afterwards.

        Returns:
            Outputs of the quantized block for `q_input`, and of the original one for `inputs`:
            `[samples, length, hidden]`. A tuple of tensors each where the block hands on several.

        Raises:
            ConfigError: inputs that are not of one shape, or an option that needs the whole model.
            NumericsError: weights or outputs are not finite.
        """
        from auto_round.autoround.one_block import quantize_one_block

        target = device if auto_offload else None
        after, before = quantize_one_block(block, inputs, q_input, self.options, target)
        return (after, before) if len(after) > 1 else (after[0], before[0])

    @cached_property
    def _is_pipeline(self) -> bool:
        """Whether the model is a pipeline of diffusers; a hub may be asked, so only runs want to know."""
        if self._model is not None:
            return is_live_pipeline(self._model)
        from auto_round.models.hub import holds_pipeline

        return holds_pipeline(self.options.model.model, self.options.model.platform)

    def _original(self) -> Any:
        """What `model` is before a run, where nobody gave an object."""
        if not self._is_pipeline:
            return super()._original()
        from auto_round.models.hub import resolve_pipeline

        return load_pipeline(resolve_pipeline(self.options.model.model, self.options.model.platform))

    def _output(
        self, output_dir: str | Path | None, formats: str | None, overwrite: bool | None = None
    ) -> OutputOptions:
        output = self.options.output
        return replace(
            output,
            output_dir=output.output_dir if output_dir is None else cast(str, output_dir),  # checked there
            format=output.format if formats is None else formats,
            overwrite=output.overwrite if overwrite is None else overwrite,
        )

    def _choices(self, options: Options) -> tuple[Options, ...]:
        """One request for each target of AutoScheme; the request itself where none is asked for."""
        if not options.auto.asked:
            return (options,)
        from auto_round.autoscheme.runs import Given, choose_schemes

        given = Given(self._model, self._tokenizer, self._dataset, self._score_dataset)
        return choose_schemes(options, self._progress, given)

    def _prepare(self, options: Options, *, rows: bool) -> Job:
        from auto_round.pipeline.deciding.prepare import prepare

        return prepare(
            options,
            model=self._model,
            tokenizer=self._tokenizer,
            processor=self._processor,
            dataset=self._dataset,
            rows=rows,
        )


def _say_what_stays(inplace: bool | None) -> None:
    if inplace:
        logger.warning("inplace=True: the model in memory stays as it is; the quantized one is returned")


def _live(value: Any) -> Any:
    """Return what is not a name."""
    return None if is_name(value) else value
