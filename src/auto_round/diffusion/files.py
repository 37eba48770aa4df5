"""The files of a pipeline's folder: configurations of tuned components, everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from auto_round.checkpoint.disk import reading, writing
from auto_round.diffusion.prepare import PipelineJob
from auto_round.export.exporter import Exporter
from auto_round.export.hf_config import read_config, write_configs
from auto_round.export.unplanned import with_unplanned
from auto_round.models.hub import PIPELINE_INDEX
from auto_round.models.replayed_source import ReplayedSource
from auto_round.pipeline.deciding.job import Job
from auto_round.schemes.float_types import FLOAT_TYPES

_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".pb", ".gguf")
"""Second copies of the weights, for other libraries."""

_BESIDE = ("LICENSE*", "NOTICE*")


def write_component(job: Job, exporter: Exporter, source: ReplayedSource, folder: Path) -> None:
    """Write the configurations of a tuned component."""
    plan, layers = with_unplanned(job.plan, source.layers, source.blocks, source.tensors, source.parameters)
    quantization = exporter.config(plan, layers, source.blocks, job.method.facts)
    whole_numbers = plan.scheme.data_type not in FLOAT_TYPES
    if quantization is not None and whole_numbers:
        quantization["scale_dtype"] = f"torch.{plan.scheme.scale_dtype}"  # diffusers casts what is stored
    write_configs(folder, read_config(source.folder), quantization)


def copy_pipeline(job: PipelineJob, folders: Mapping[str, Path]) -> None:
    """Copy everything but the tuned components, byte for byte.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    source = job.pipeline.folder
    for name in _kept_files(job):
        for folder in folders.values():
            target = folder / name
            if target.is_file() and target.stat().st_size == (source / name).stat().st_size:
                continue  # of an earlier run that was killed; the last file may be cut short
            with reading(source / name), writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target)


def _kept_files(job: PipelineJob) -> Iterator[Path]:
    """Files that a pipeline loads beside its tuned components, relative to its folder."""
    root = job.pipeline.folder
    yield Path(PIPELINE_INDEX)
    for pattern in _BESIDE:
        yield from sorted(path.relative_to(root) for path in root.glob(pattern) if path.is_file())
    for name in job.pipeline.components:
        if (root / name).is_dir():
            inside = sorted(path for path in (root / name).rglob("*") if path.is_file())
            kept = (path for path in inside if path.suffix not in _OTHER_WEIGHTS)
            yield from (p.relative_to(root) for p in kept if name not in job.jobs or not _written(p))


def _written(path: Path) -> bool:
    """Whether a file of a tuned component is not copied, but written anew."""
    return path.name == "config.json" or any(path.match(f"*.safetensors{end}") for end in ("", ".index.json"))
