"""Tensors of an output that are no quantized layers: copied from the source, or made as the format says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from auto_round.checkpoint.writer import ShardWriter
from auto_round.errors import NumericsError
from auto_round.export.exporter import Exporter
from auto_round.export.manifest import Manifest
from auto_round.facts.tensor import dtype_name
from auto_round.models.source import matrix_reader
from auto_round.numerics.format import Format
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.kept_dtype import as_wanted
from auto_round.pipeline.machine.workers import workers
from auto_round.pipeline.running.rounding import round_matrix

BAND = 1 << 24
"""Weights rounded at a time: an embedding of a hundred thousand rows is never held in float32."""


def write_rest(job: Job, exporter: Exporter, manifest: Manifest, writer: ShardWriter) -> None:
    """Write everything of an output that is missing.

    Raises:
        NumericsError: a weight is not finite, or too large for its dtype; names the tensor.
    """
    copied, read = set(manifest.copied), matrix_reader(job.source)
    for name in writer.missing:
        if name not in copied:
            writer.put(name, make_rest(job, exporter, name, read))
        elif manifest.specs[name].dtype != job.source.tensors[name].dtype:
            writer.put(name, cast(name, job.source.read_tensor(name), manifest.specs[name].dtype))
    for name in writer.missing:
        if job.source.files is None:
            writer.put(name, job.source.read_tensor(name))
        else:
            writer.copy(name, job.source.files)


def make_rest(job: Job, exporter: Exporter, name: str, read: Callable[[str], Tensor]) -> Tensor:
    """A tensor that is neither a layer nor copied, as it is stored.

    Args:
        job: the run.
        exporter: of the output.
        name: in the manifest.
        read: reads a tensor of the source, or one matrix of all experts', by name.

    Raises:
        NumericsError: a weight is not finite; names the tensor.
    """
    rest = exporter.rest(name, read)
    if rest.format is None:
        return rest.values
    bands = torch.split(rest.values, max(1, BAND // rest.values.shape[-1]))
    with workers(job.device) as pool:
        return torch.cat(list(pool.map(partial(_round, job, exporter, name, rest.format), bands)))


def _round(job: Job, exporter: Exporter, name: str, fmt: Format, band: Tensor) -> Tensor:
    """Stored form of a band of rows."""
    weight = as_wanted(band, job.kept_dtype)
    return exporter.encode_rest(round_matrix(name, weight, fmt, job.device, effort=job.effort)).cpu()


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        NumericsError: numbers beyond the range of that dtype.
    """
    stored = tensor.to(dtype)
    lost = int((stored.isinf() & ~tensor.isinf()).sum()) if dtype != tensor.dtype else 0
    if lost:
        raise NumericsError(
            f"{name}: {lost} numbers are too large for {dtype_name(dtype)}, in which this "
            "output format stores them; use the format auto_round"
        )
    return stored
