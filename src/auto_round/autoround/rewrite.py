"""Write a finished model again, in other formats or another folder, from its own codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round.checkpoint.disk import writing
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.consumers.lines import judge_outputs
from auto_round.errors import ConfigError
from auto_round.export.compressed_cache import scale_name
from auto_round.export.compressed_config import compressed_layout
from auto_round.facts.attention import Attention
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.layer import Layer
from auto_round.layouts.layer import LayerLayout
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import PACKING_FORMAT, layout_for, layout_of
from auto_round.pipeline.checking.verify import verify_all
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.pipeline.result import Result
from auto_round.pipeline.writing.cost import carry_record
from auto_round.pipeline.writing.finish import write_configs_and_tokenizer, write_report
from auto_round.pipeline.writing.outputs import Outputs
from auto_round.pipeline.writing.signature import request_digest, signature
from auto_round.report.make import make_page
from auto_round.schemes.attention import AttentionPlan


@plain_device()
def rewrite(job: Job, folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write what lies in `folder` as the job says; nothing is rounded again.

    Args:
        job: model, plan, exporters and output folder.
        folder: a finished folder of packed whole numbers, for the same plan.
        report: report of the run that made it.

    Returns:
        The folder of each format.

    Raises:
        ConfigError: the output holds something else, or `folder` holds no codes.
        CheckpointError: a tensor cannot be read or written.
    """
    config = _config(folder)
    asked = request_digest(signature(job))
    with _open(job) as output:
        output.discard()
        folders = job.folders(output.folder)
        with (
            Checkpoint.open(folder) as finished,
            Outputs.open(job, folders, None) as outputs,
        ):
            quantized = job.quantized()
            order_of = _order_of(config, job)
            for layer, fmt in quantized.values():
                order = order_of(layer)
                stored = LayerLayout(order, fmt, layer.shape, job.plan.inputs_of(layer))
                parts = {suffix: finished.read(f"{layer.name}.{suffix}") for suffix in stored.spec()}
                outputs.put(layer, stored.unpack(parts))
            if job.caches is not None:
                for attention in job.caches.modules:
                    outputs.put_scales(attention, _scales(finished, job.caches, attention))
            codes = {f"{name}.weight" for name in quantized}  # some layouts keep the name of the weight
            for name in job.source.tensors:
                if name in finished and name not in codes:
                    outputs.put_plain(name, finished.read(name))
            outputs.seal()
        write_configs_and_tokenizer(job, folders)
        own: dict[str, Any] = {"formats": list(job.exporters), "bytes_after": outputs.nbytes, "verified": {}}
        own["engines"] = judge_outputs(folders)
        if job.options.output.verify:
            own["verified"] = verify_all(job, folders, None)
        write_report(job, folders, {**report, **own}, output.folder)
        carry_record(folder, output.folder)
        final = output.seal(asked)
    return _finished(job, final)


def copy_files(job: Job, finished: Mapping[str, Path], result: Result) -> list[Path]:
    """Copy finished folders to where the job says.

    Args:
        job: exporters, report and output folder.
        finished: format -> folder.
        result: of the run that made them.

    Returns:
        The folder of each format.

    Raises:
        ConfigError: the output holds something else; disk full, no permission.
    """
    asked = request_digest(signature(job))
    with _open(job) as output:
        output.discard()
        folders = job.folders(output.folder)
        for name, folder in folders.items():
            with writing(folder):
                shutil.copytree(finished[name], folder, dirs_exist_ok=True)
        sizes = {name: result.report["bytes_after"][name] for name in folders}
        own = {"formats": list(folders), "bytes_after": sizes}
        write_report(job, folders, {**result.report, **own}, output.folder)
        carry_record(result.folders[0], output.folder)
        final = output.seal(asked)
    return _finished(job, final)


def _open(job: Job) -> OutputFolder:
    return OutputFolder.open(job.output, overwrite=job.options.output.overwrite, source=job.source.folder)


def _finished(job: Job, final: Path) -> list[Path]:
    """The folder of each format of a finished output, with its page where it is asked for."""
    if job.options.output.report:
        make_page([final])
    return list(job.folders(final).values())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "quantization_config.json"
    if not path.is_file():
        raise ConfigError(
            "only the rounded weights were kept, not their codes: to write another format, call "
            "quantize_and_save(output_dir, format=...)"
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _order_of(config: Mapping[str, Any], job: Job) -> Callable[[Layer], Layout]:
    """What tells the order of bytes in which a layer lies.

    GPTQ and AWQ folders have one for all layers, the others may have several.
    """
    method = config["quant_method"]
    if method == COMPRESSED_TENSORS:
        schemes = {name: s for name in job.plan.quantized if (s := job.plan.scheme_of(name)) is not None}
        return lambda layer: compressed_layout(schemes[layer.name])
    top = layout_of(config)
    extra = (config.get("extra_config") or {}) if method == "auto-round" else {}
    packings = {name: said[PACKING_FORMAT] for name, said in extra.items() if PACKING_FORMAT in said}
    return lambda layer: layout_for(packings[layer.name]) if layer.name in packings else top


def _scales(finished: Checkpoint, caches: AttentionPlan, attention: Attention) -> dict[str, Tensor]:
    """Part -> scales of an attention, as the folder holds them."""
    names = {part: scale_name(attention, part) for part in caches.scales(attention)}
    return {part: finished.read(name).reshape(-1) for part, name in names.items()}
