"""Write a finished model again, in other formats or another folder, from its own codes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.errors import ConfigError
from auto_round.layouts.layout import Layout
from auto_round.layouts.table import layout_for
from auto_round.models.layer import Layer
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.finish import write_configs_and_tokenizer, write_report
from auto_round.pipeline.job import Job
from auto_round.pipeline.outputs import Outputs


def rewrite(job: Job, folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write what lies in `folder` as the job says; nothing is rounded again.

    Args:
        job: model, plan, exporters and output folder.
        folder: a finished folder of the `auto_round` format, for the same plan.
        report: report of the run that made it.

    Returns:
        The folder of each format.

    Raises:
        ConfigError: the output holds something else, or `folder` holds no codes.
        CheckpointError: a tensor cannot be read or written.
    """
    layout = _layout(folder)
    with OutputFolder.open(job.output, overwrite=job.options.output.overwrite) as output:
        output.discard()
        folders = job.folders(output.folder)
        with (
            Checkpoint.open(folder) as finished,
            Outputs.open(job, folders, done=(), fresh=True) as outputs,
        ):
            for layer, fmt in job.quantized().values():
                outputs.put(layer, _read(finished, layer, fmt, layout))
            for name in job.source.tensors:
                if name in finished:
                    outputs.put_plain(name, finished.read(name))
            outputs.seal()
        write_configs_and_tokenizer(job, folders)
        own = {"formats": list(job.exporters), "bytes_after": outputs.nbytes, "verified": {}}
        write_report(job, folders, {**report, **own}, output.folder)
        return list(job.folders(output.seal()).values())


def _layout(folder: Path) -> Layout:
    path = folder / "quantization_config.json"
    if not path.is_file():
        raise ConfigError(
            "only the rounded weights were kept, not their codes: to write another format, call "
            "quantize_and_save(output_dir, format=...)"
        )
    return layout_for(json.loads(path.read_text(encoding="utf-8"))["packing_format"])


def _read(finished: Checkpoint, layer: Layer, fmt: Format, layout: Layout) -> QTensor:
    """Codes of one layer."""
    suffixes = layout.spec(fmt, layer.shape)
    parts = {suffix: finished.read(f"{layer.name}.{suffix}") for suffix in suffixes}
    return layout.unpack(parts, fmt, layer.shape)
