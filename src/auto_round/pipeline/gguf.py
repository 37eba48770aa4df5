"""Preparing a run that writes a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round.export.exporter import Exporter
from auto_round.export.gguf.exporter import GgufExporter
from auto_round.export.gguf.imatrix import read_imatrix
from auto_round.export.gguf.model import describe, model_name
from auto_round.export.gguf.template import from_template, with_name
from auto_round.export.table import parse_formats
from auto_round.log import logger
from auto_round.models.source import ModelSource
from auto_round.pipeline.gguf_plan import plan_gguf
from auto_round.pipeline.gguf_request import GgufRequest
from auto_round.pipeline.settings import plan_request
from auto_round.schemes.plan import Plan


def prepare_gguf(
    request: GgufRequest, source: ModelSource, tokenizer: Any, *, imatrix: bool
) -> tuple[Plan, dict[str, Exporter], Mapping[str, Tensor]]:
    """The plan, the exporters by name (the GGUF file's and those beside it), and importances from a file.

    Args:
        request: what the user asked for.
        source: the model; weights are read only to compare them with a template.
        tokenizer: its tokenizer; None with a template.
        imatrix: importances will steer the rounding.

    Raises:
        UnsupportedError: llama.cpp has no words for the model or its tokenizer.
        ConfigError: a rule that cannot hold in a GGUF file, or the `gguf` package is missing.
        CheckpointError: a template or importances of another model.
    """
    options = request.options
    name = model_name(source.folder, options.model.model, source.config)
    template = options.output.gguf_template
    if template is None:
        model = describe(source, tokenizer, name)
    else:
        model = with_name(from_template(Path(template), source), name)
    plan, types = plan_gguf(source, model, request, plan_request(options.scheme), imatrix=imatrix)
    for warning in plan.warnings:
        logger.warning(warning)
    exporter = GgufExporter(request.wanted, f"{name}-{request.wanted.name.upper()}.gguf", model, types)
    others = parse_formats(",".join(request.others)) if request.others else []
    exporters: dict[str, Exporter] = {exporter.name: exporter}
    exporters |= {e.name: e.for_plan(plan, source.layers) for e in others}
    path = options.calibration.imatrix
    importance = {} if path is None else read_imatrix(Path(path)).for_sources(model)
    return plan, exporters, importance
