"""AutoRound: the user's class. It turns arguments into options and hands them to the pipeline."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_round.autoround.signature import collect, make_documentation, make_signature, read_arguments
from auto_round.config import Options, OutputOptions, read_environment
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.log import ProgressSink, ignore_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from auto_round.pipeline.job import Job
    from auto_round.pipeline.result import Result


class AutoRound:
    """Makes a language model small.

        AutoRound("path/or/hub-name", scheme="W4A16").quantize_and_save("out", format="auto_round")

    Args:
        model: folder or hub name, or a Transformers model in memory (left as it is).
        tokenizer: folder or hub name, or a tokenizer; a model in memory needs it unless `dataset` is tokens.
        positional: further arguments in the order of the signature.
        recipe: "default", "best", "light", "rtn" or "opt_rtn": other defaults for some arguments.
        progress: called with a `Progress` event whenever a piece of work is done.
        named: the arguments below.

    A scheme may also be a dict of its fields or a `QuantizationScheme`; `dataset` a list of texts, token ids
    or dicts, or a DataLoader. Unknown arguments raise `ConfigError` with the nearest names.
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
        if self._dataset is not None:
            given["dataset"] = f"{type(self._dataset).__name__} given from Python"
        self._model, self._tokenizer = _live(model), _live(tokenizer)
        if self._model is not None and tokenizer is None and self._dataset is None:
            raise ConfigError("a model in memory needs its tokenizer: AutoRound(model, tokenizer, ...)")
        name = str(model) if self._model is None else type(model).__name__
        given |= {"model": name, "tokenizer": tokenizer if self._tokenizer is None else None}
        self.options: Options = read_arguments(given, recipe)
        self._progress = progress or ignore_progress
        self._finished: _Finished | None = None

    def quantize(self) -> tuple[Any, dict[str, dict[str, Any]]]:
        """Quantize; `save_quantized` can then write the result, more than once.

        The result lies in a scratch folder, which is deleted with this object.

        Returns:
            The quantized model, ready to run, and the scheme of every quantized layer by name.

        Raises:
            AutoRoundError: the request is wrong, or the work failed.
        """
        from auto_round.pipeline.clock import Clock
        from auto_round.pipeline.quantize import run_job

        space = read_environment().work_space
        if space is not None:
            space.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="auto_round-", dir=space)
        output = self._output(Path(scratch.name) / "model", self.options.output.formats[0])
        job = self._prepare(output, rows=True)
        result = run_job(job, self._progress, Clock())
        self._finished = _Finished(scratch, job, result)
        return self._load(result.folders[0]), _layer_schemes(result)

    def save_quantized(
        self, output_dir: str | Path | None = None, format: str | None = None, inplace: bool = True
    ) -> list[Path]:
        """Write what `quantize()` made.

        Args:
            output_dir: where to; the constructor's (`tmp_autoround`) when not given. Several formats get a
                sub-folder each.
            format: comma list of formats; the constructor's (`auto_round`) when not given.
            inplace: accepted; nothing in memory is changed either way.

        Returns:
            The folder of each format.

        Raises:
            ConfigError: `quantize()` was not called, or the folder holds something else.
            UnsupportedError: a format cannot hold this plan.
        """
        from auto_round.autoround.rewrite import rewrite
        from auto_round.pipeline.gguf_request import gguf_request

        done = self._finished
        if done is None:
            raise ConfigError("nothing to save yet: call quantize() first, or quantize_and_save() instead")
        output = self._output(output_dir, format)
        if gguf_request(replace(self.options, output=output)) is not None:
            raise UnsupportedError(
                "a GGUF file has a plan of its own",
                [Refusal("gguf", "it is not what quantize() made", "call quantize_and_save(format=...)")],
            )
        job = self._prepare(output, rows=False)
        job = replace(job, rows=done.job.rows, tuned=done.job.tuned)
        return rewrite(job, done.result.folders[0], done.result.report)

    def quantize_and_save(
        self,
        output_dir: str | Path | None = None,
        format: str | None = None,
        inplace: bool = True,
        *,
        load: bool = True,
    ) -> tuple[Any, list[Path]]:
        """Quantize and write block by block; the whole model is never in memory while it works.

        Args:
            output_dir: where to; the constructor's (`tmp_autoround`) when not given. Several formats get a
                sub-folder each.
            format: comma list of formats; the constructor's (`auto_round`) when not given.
            inplace: accepted; a model given in memory is not changed either way.
            load: read the quantized model back to return it; never done with GGUF files.

        Returns:
            The quantized model from the last folder (None with `load=False`), and the folder of each format.

        Raises:
            AutoRoundError: the request is wrong, or the work failed.
        """
        from auto_round.pipeline.clock import Clock
        from auto_round.pipeline.quantize import run_job

        clock = Clock()
        job = self._prepare(self._output(output_dir, format), rows=True)
        folders = list(run_job(job, self._progress, clock).folders)
        return self._load(folders[-1]) if load else None, folders

    def quantize_block(
        self,
        block: nn.Module,
        inputs: Sequence[Any] | Tensor,
        q_input: Sequence[Tensor] | Tensor | None = None,
        device: str | torch.device = "cpu",
        auto_offload: bool = True,
    ) -> tuple[Tensor, Tensor]:
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
            `[samples, length, hidden]`.

        Raises:
            ConfigError: inputs that are not of one shape, or an option that needs the whole model.
            NumericsError: weights or outputs are not finite.
        """
        from auto_round.autoround.one_block import quantize_one_block

        target = device if auto_offload else None
        return quantize_one_block(block, inputs, q_input, self.options, target)

    def _output(self, output_dir: str | Path | None, formats: str | None) -> OutputOptions:
        output = self.options.output
        return replace(
            output,
            output_dir=output.output_dir if output_dir is None else str(output_dir),
            format=output.format if formats is None else formats,
        )

    def _prepare(self, output: OutputOptions, *, rows: bool) -> Job:
        from auto_round.pipeline.prepare import prepare

        return prepare(
            replace(self.options, output=output),
            model=self._model,
            tokenizer=self._tokenizer,
            dataset=self._dataset,
            rows=rows,
        )

    def _load(self, folder: Path) -> Any:
        """Read a quantized model with Transformers and, of GPTQ and AWQ folders too, with this package."""
        from transformers import AutoModelForCausalLM, AutoRoundConfig

        from auto_round.export.hf_config import read_config

        if any(folder.glob("*.gguf")):
            return None  # for llama.cpp and its kin
        method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
        settings = {"quantization_config": AutoRoundConfig()} if method in ("gptq", "awq") else {}
        trust = self.options.model.trust_remote_code
        with warnings.catch_warnings():
            # Transformers warns that only the backend of what is passed will be used: that is what is meant.
            warnings.simplefilter("ignore", UserWarning)
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=trust, **settings
            )


@dataclass(frozen=True, slots=True)
class _Finished:
    """What `quantize()` leaves for `save_quantized`: its folder, deleted with this object, and its job."""

    scratch: tempfile.TemporaryDirectory[str]
    job: Job
    result: Result


def _layer_schemes(result: Result) -> dict[str, dict[str, Any]]:
    entries = result.plan.entries.items()
    return {name: entry.scheme.to_dict() for name, entry in entries if entry.scheme is not None}


def _live(value: Any) -> Any:
    """Return what is not a name."""
    return None if isinstance(value, (str, Path)) else value
