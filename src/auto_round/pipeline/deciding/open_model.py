"""Second step of a job: the model opened, without its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from auto_round.calibration.hub import is_reachable
from auto_round.calibration.pictures import ImageReader
from auto_round.checkpoint.workfolder import refuse_occupied
from auto_round.config.options import Options
from auto_round.errors import ConfigError
from auto_round.export.gguf.source import gguf_file, open_gguf
from auto_round.facts.roles import render_roles
from auto_round.log import logger
from auto_round.models.folder import FolderSource
from auto_round.models.hub import resolve_model
from auto_round.models.live import LiveSource
from auto_round.models.on_paper import is_on_paper, open_on_paper
from auto_round.models.source import ModelSource
from auto_round.models.tokenizers import refuse_empty
from auto_round.pipeline.deciding.image_rows import image_reader
from auto_round.pipeline.deciding.kept_dtype import named_dtype
from auto_round.pipeline.deciding.request import Request


@dataclass(frozen=True, slots=True)
class Opened:
    """A model that is ready to be planned.

    Attributes:
        options: the request's, with rows no longer than the model's context.
        source: the model.
        tokenizer: its tokenizer; None where it has none.
        images: makes rows with images; None for a model that reads none.
    """

    options: Options
    source: ModelSource
    tokenizer: Any
    images: ImageReader | None = None


def open_model(
    request: Request,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    dry: bool = False,
) -> Opened:
    """Open the model and its tokenizer; configuration and headers are read, no weights.

    Args:
        request: what is asked for.
        model: a model in memory instead of the one that the options name.
        tokenizer: its tokenizer, an object; None to load it.
        processor: its processor for images, an object; None to load it when it is needed.
        dry: nothing will be read, so that a configuration without weights will do.

    Raises:
        ConfigError: no such model, or a tokenizer that is named or needed and is not there.
        AutoRoundError: a folder that cannot be read.
    """
    options = request.options
    source = _open_source(options, model, dry=dry)
    if not source.tried:
        _tell_roles(source)
    needed = any(exporter.needs_tokenizer(options) for exporter in request.formats)
    if tokenizer is None and (needed or options.model.tokenizer or source.folder is not None):
        tokenizer = load_tokenizer(options, source, required=needed)
    images = image_reader(options, source, processor)
    return Opened(within_context(options, source), source, tokenizer, images)


def refuse_outputs(opened: Opened, folders: Iterable[Path]) -> None:
    """Refuse outputs that cannot go where they are wanted, before data are fetched or anything is measured.

    Args:
        opened: the model, which no output replaces.
        folders: of the outputs.

    Raises:
        ConfigError: something else lies there.
    """
    for folder in folders:
        where = folder.expanduser().resolve()
        refuse_occupied(where, overwrite=opened.options.output.overwrite, source=opened.source.folder)


def _open_source(options: Options, model: nn.Module | None, *, dry: bool) -> ModelSource:
    dtype = named_dtype(options.model.model_dtype)
    if model is not None:
        return LiveSource(model, dtype)
    if not options.model.model:
        raise ConfigError("no model given: name a folder or a hub id, for example --model Qwen/Qwen3-0.6B")
    trust = options.model.trust_remote_code
    path = resolve_model(options.model.model, platform=options.model.platform, trust_remote_code=trust)
    if dry and path.is_dir() and is_on_paper(path):
        return open_on_paper(path, trust_remote_code=trust, dtype=dtype)
    opened = FolderSource.open if gguf_file(path) is None else open_gguf
    return opened(path, trust_remote_code=trust, dtype=dtype)


def _tell_roles(source: ModelSource) -> None:
    """Log what was found in a model of a family that nobody has tried."""
    logger.info(
        'models of type "%s" (%s) are not among those that were tried; its matrices by what they do:\n%s\n'
        "--ignore_layers keeps those that should stay as they are",
        source.config.model_type,
        source.model_class,
        render_roles(source.roles),
    )


def load_tokenizer(options: Options, source: ModelSource, *, required: bool) -> Any:
    """The tokenizer that is named, else the model's; None where it has none and none is required.

    Raises:
        ConfigError: it is named or required and cannot be loaded.
    """
    from huggingface_hub.constants import ENDPOINT
    from transformers import AutoTokenizer

    where = options.model.tokenizer or str(source.folder)
    here = Path(where).expanduser().is_dir() or not is_reachable(f"{ENDPOINT}/api/models/{where}")
    try:
        found = AutoTokenizer.from_pretrained(
            where, trust_remote_code=options.model.trust_remote_code, local_files_only=here
        )
        refuse_empty(found)
        return found
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not required and options.model.tokenizer is None:
            return None
        remedy = "name one with --tokenizer"
        if options.model.tokenizer is not None:
            remedy = "--tokenizer takes a folder with the files of a tokenizer, or the name of one on the hub"
        raise ConfigError(f"no tokenizer in {where} ({error}): {remedy}") from error


def within_context(options: Options, source: ModelSource, *, quiet: bool = False) -> Options:
    """The same options with rows no longer than the model's context.

    Args:
        options: of the run.
        source: the model.
        quiet: a trial, of which the user hears nothing.
    """
    context, wanted = source.facts.context, options.calibration.seqlen
    if context is None or wanted <= context:
        return options
    if not quiet:
        level = logger.warning if "seqlen" in options.given else logger.info
        level("seqlen %d is longer than the model's context: rows have %d tokens", wanted, context)
    return replace(options, calibration=replace(options.calibration, seqlen=context))
