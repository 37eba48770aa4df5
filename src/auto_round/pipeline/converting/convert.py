"""Conversion of a quantized folder to another format: codes and steps move, nothing is rounded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from auto_round.checkpoint.disk import copy_at, reading, replacing, writing
from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.shards import INDEX_FILE
from auto_round.checkpoint.workfolder import OutputFolder
from auto_round.checkpoint.writer import ShardWriter
from auto_round.consumers.folder import CONFIG, QUANTIZATION_CONFIG
from auto_round.errors import ConfigError, Refusal, UnsupportedError
from auto_round.export.exporter import Exporter
from auto_round.export.hf_config import write_configs
from auto_round.export.manifest import Manifest
from auto_round.export.table import all_refusals, parse_formats
from auto_round.export.unplanned import with_unplanned
from auto_round.facts.layer import Layer
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import dtype_name
from auto_round.log import logger
from auto_round.models.hub import refuse_pipeline
from auto_round.numerics.activation_float import CalibratedScale
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.pipeline.checking.reload import check_loads
from auto_round.pipeline.converting.modules import with_modules
from auto_round.pipeline.converting.source import QuantizedFolder, open_stored, with_steps
from auto_round.pipeline.machine.default_device import plain_device
from auto_round.schemes.plan import Plan
from auto_round.schemes.vocabulary import SCALE_DTYPE_SPELLINGS
from auto_round.stored.configuration import is_plain
from auto_round.version import __version__

GENERATED = (CONFIG, QUANTIZATION_CONFIG, "quantize_config.json", "quant_config.json", INDEX_FILE)
"""Files that are written anew or, where they are the words of another tool, would contradict the new ones."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A finished conversion.

    Attributes:
        folder: the new folder.
        format: name of the format.
        layers: number of matrices whose codes were moved.
        nbytes: bytes of the weight files.
        verified: what reloading it gave, see `reload.check_loads`.
    """

    folder: Path
    format: str
    layers: int
    nbytes: int
    verified: Mapping[str, Any]


@plain_device()
def convert_folder(
    folder: str | Path,
    format_name: str,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    verify: bool = True,
) -> Converted:
    """Write a quantized folder in another format without changing a code or a step.

    One layer at a time is in memory. The new folder appears complete, and only when Transformers loads it.

    Args:
        folder: of quant_method `auto-round`, `gptq`, `awq`, `compressed-tensors` or `fp8`.
        format_name: an output format of packed numbers.
        output: new folder; None for one beside `folder` with the format's name added.
        overwrite: replace an older output of this package.
        verify: load the new folder and send a token through it.

    Raises:
        ConfigError: no such folder or format, or the output's place is taken.
        UnsupportedError: the format cannot hold a layer exactly; names layers and reasons.
        CheckpointError: a damaged file, or a new folder that does not load.
    """
    exporter = _one_format(format_name)
    source = Path(folder).expanduser()
    target = Path(output) if output is not None else source.resolve().with_name(_new_name(source, exporter))
    refuse_pipeline(source)
    with Checkpoint.open(source) as checkpoint:
        stored, loading = with_modules(open_stored(source, checkpoint))
        exporter, plan = _fitting(exporter, stored, loading)
        manifest = exporter.manifest(plan, stored.layers, stored.tensors)
        _refuse_weights(exporter, manifest)
        asked = _asked(checkpoint, stored, exporter)
        with OutputFolder.open(target, overwrite=overwrite, source=source) as place:
            if place.holds(asked):
                place.abandon()
                logger.warning(
                    "%s was converted already: nothing was done (--overwrite does it again)", place.out
                )
                return _earlier(place.out, exporter, manifest)
            place.discard()
            try:
                nbytes = _write(place.folder, checkpoint, stored, exporter, plan, manifest)
                _copy_files(source, place.folder)
                _write_configs(place.folder, stored, exporter, plan)
                skipped = exporter.unchecked if verify else "it was not asked for"
                verified = {"skipped": skipped} if skipped else check_loads(place.folder)
                final = place.seal(asked)
            except BaseException:
                shutil.rmtree(place.partial, ignore_errors=True)  # nothing in it could be continued
                raise
    return Converted(final, exporter.name, len(manifest.encoded), nbytes, verified)


def _asked(checkpoint: Checkpoint, stored: QuantizedFolder, exporter: Exporter) -> str:
    """Digest of what is converted into what."""
    config = json.dumps(stored.config, sort_keys=True, default=repr)
    text = "\n".join([__version__, checkpoint.fingerprint(), config, repr(exporter)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _earlier(folder: Path, exporter: Exporter, manifest: Manifest) -> Converted:
    """The result of an earlier conversion, as it lies there."""
    with Checkpoint.open(folder) as checkpoint:
        nbytes = sum(file.stat().st_size for file in checkpoint.files)
    return Converted(folder, exporter.name, len(manifest.encoded), nbytes, {"tokens": 1})


def _one_format(name: str) -> Exporter:
    exporters = parse_formats(name)
    if len(exporters) != 1:
        raise ConfigError(f'one format at a time, got "{name}"')
    (exporter,) = exporters
    if exporter.planner is not None or exporter.file is not None:
        _refuse_unpacked(exporter, f"{exporter.noun} is made from the original model")
    return exporter


def _new_name(source: Path, exporter: Exporter) -> str:
    return f"{source.resolve().name}-{exporter.name.replace(':', '-')}"


def _fitting(exporter: Exporter, stored: QuantizedFolder, loading: Loading | None) -> tuple[Exporter, Plan]:
    """The exporter for what is stored, and the plan that it takes.

    Steps are tried as they are stored, then as float16 and in the dtype of the model, on which some formats
    insist and which are exact for most steps of other dtypes (`_exact` has the last word).

    Raises:
        UnsupportedError: the format cannot hold a layer.
    """
    found: list[Refusal] = []
    own = {dtype_name(layer.dtype) for layer in stored.layers}
    for dtype in (None, "float16", *sorted(own & SCALE_DTYPE_SPELLINGS.keys())):
        plan = stored.plan if dtype is None else with_steps(stored.plan, dtype)
        fitting = exporter.for_plan(plan, stored.layers)
        refused = all_refusals(fitting, plan, stored.layers, loading)
        if not refused:
            return fitting, plan
        found = found or refused
    raise UnsupportedError(f"{stored.folder} cannot be written as {exporter.name} without a change", found)


def _refuse_weights(exporter: Exporter, manifest: Manifest) -> None:
    for layer, names in manifest.encoded.items():
        if all(is_plain(manifest.specs[name].dtype) for name in names):
            _refuse_unpacked(exporter, f"it stores weights, not codes ({layer})")


def _refuse_unpacked(exporter: Exporter, reason: str) -> NoReturn:
    raise UnsupportedError(
        f"{exporter.name} is no format of packed numbers",
        [Refusal(exporter.name, reason, "quantize into it instead")],
    )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    stored: QuantizedFolder,
    exporter: Exporter,
    plan: Plan,
    manifest: Manifest,
) -> int:
    """Write all tensors; returns the bytes of the files."""
    specs = {name: (spec.dtype, tuple(spec.shape)) for name, spec in manifest.specs.items()}
    layers = {layer.name: layer for layer in stored.layers}
    with ShardWriter.create(folder, specs) as writer:
        for name in manifest.encoded:
            packed = stored.packed[name].read(checkpoint)
            for tensor_name, tensor in _encoded(exporter, plan, layers[name], packed):
                writer.put(tensor_name, tensor)
        for name in writer.missing:
            if specs[name][0] == checkpoint.info(name).dtype:
                writer.copy(name, checkpoint)
            else:
                writer.put(name, _exact(name, checkpoint.read(name), specs[name][0]))
        nbytes = writer.nbytes
        writer.seal()
    return nbytes


def _encoded(
    exporter: Exporter, plan: Plan, layer: Layer, stored: QuantizedLayer
) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors of a layer in the new format.

    Raises:
        UnsupportedError: a step that the format cannot hold exactly, or a zero point.
    """
    fmt = plan.format_of(layer.name)
    if fmt is None:
        return
    wanted = exporter.spec(layer, fmt)
    number, inputs = stored.input_scale, plan.inputs_of(layer)
    if number is not None and isinstance(inputs, CalibratedScale):
        number = _exact(layer.name, number, inputs.dtype)
    moved = replace(stored, weight=_in_format(layer.name, stored.weight, fmt), input_scale=number)
    try:
        parts = exporter.encode(layer, moved)
    except UnsupportedError as error:
        raise UnsupportedError(f'layer "{layer.name}" cannot be converted', error.refusals) from error
    yield from ((name, parts[name]) for name in wanted)


def _in_format(layer: str, q: QTensor, fmt: Format) -> QTensor:
    """The same numbers in a format whose scales have other dtypes.

    Raises:
        UnsupportedError: some are no numbers of that dtype.
    """
    if fmt == q.format:
        return q
    parts = {name: _exact(layer, part, fmt.rule.stored[name].dtype) for name, part in q.scale.parts.items()}
    return QTensor(q.codes, fmt.rule.read(parts), fmt)


def _exact(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        UnsupportedError: some of its numbers are not numbers of that dtype.
    """
    cast = tensor.to(dtype)
    lost = int((cast.to(torch.float64) != tensor.to(torch.float64)).sum())
    if lost:
        short = [dtype_name(d) for d in (tensor.dtype, dtype)]
        raise UnsupportedError(
            f'"{name}" cannot be converted exactly',
            [
                Refusal(
                    name, f"{lost} of {tensor.numel()} numbers are {short[0]} and no numbers of {short[1]}"
                )
            ],
        )
    return cast


def _write_configs(folder: Path, stored: QuantizedFolder, exporter: Exporter, plan: Plan) -> None:
    plan, layers = with_unplanned(plan, stored.layers, stored.blocks, stored.tensors, stored.parameters)
    quantization = exporter.config(plan, layers, stored.blocks, stored.facts)
    write_configs(folder, stored.config, quantization, dtype=exporter.float_dtype)


def _copy_files(source: Path, target: Path) -> None:
    """Copy every file of the folder but weights and what is written anew."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or name.parts[0].startswith(".") or _is_generated(name):
            continue
        with writing(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        with reading(path), path.open("rb") as file, replacing(target / name) as fd:
            copy_at(file.fileno(), 0, fd, 0, path.stat().st_size)
    logger.debug("copied the other files of %s", source)


def _is_generated(name: Path) -> bool:
    return len(name.parts) == 1 and (name.name in GENERATED or name.suffix == ".safetensors")
