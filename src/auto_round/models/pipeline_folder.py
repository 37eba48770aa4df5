"""The folder of a diffusers pipeline: which components it has, and of which classes."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.checkpoint.disk import reading
from auto_round.errors import CheckpointError, ConfigError, nearest
from auto_round.models.hub import PIPELINE_INDEX as INDEX

DENOISERS = ("transformer", "transformer_2", "unet")
"""Components that are made small unless others are named."""

INSTALL = 'pip install "auto-round[diffusion]"'


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """A pipeline on disk.

    Attributes:
        folder: where it lies.
        class_name: class of the pipeline.
        components: name -> library and class, for those that are there.
    """

    folder: Path
    class_name: str
    components: Mapping[str, tuple[str, str]]

    @classmethod
    def open(cls, folder: Path) -> PipelineFolder:
        """Read the index.

        Raises:
            CheckpointError: it is no index of a pipeline.
        """
        path = folder / INDEX
        with reading(path):
            text = path.read_bytes()
        try:
            index = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        name = index.get("_class_name") if isinstance(index, dict) else None
        if not isinstance(name, str):
            raise CheckpointError(f"{path} names no class of a pipeline (_class_name)")
        pairs = {key: tuple(value) for key, value in index.items() if isinstance(value, list)}
        return cls(folder, name, {k: v for k, v in pairs.items() if len(v) == 2 and all(v)})

    def kind(self, component: str) -> Any:
        """Class of a component.

        Raises:
            ConfigError: there is no such component, or the installed libraries do not know its class.
        """
        if component not in self.components:
            raise ConfigError(
                f'{self.folder}: the pipeline has no component "{component}": '
                f"{nearest(component, self.components)} (all: {', '.join(self.components)})"
            )
        library, name = self.components[component]
        require_diffusers()
        if library not in ("diffusers", "transformers"):
            raise ConfigError(f'component "{component}" is a class of {library}, which is not loaded here')
        found = getattr(importlib.import_module(library), name, None)
        if found is None:
            raise ConfigError(
                f'component "{component}" is a {name}, which the installed {library} does not know'
            )
        return found

    def is_encoder(self, component: str) -> bool:
        """Whether a component is a model of Transformers, which reads captions as a rule."""
        return self.components[component][0] == "transformers"

    @property
    def call_parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the pipeline can be called with.

        Raises:
            ConfigError: the installed diffusers does not know its class.
        """
        diffusers = require_diffusers()
        kind = getattr(diffusers, self.class_name, None)
        if kind is None:
            raise ConfigError(
                f"{self.folder}: diffusers {diffusers.__version__} does not know {self.class_name}"
            )
        return inspect.signature(kind.__call__).parameters

    def load(
        self, dtype: torch.dtype, device: torch.device, replaced: Mapping[str, nn.Module] | None = None
    ) -> Any:
        """The pipeline in memory, in evaluation mode.

        Args:
            dtype: dtype in which it computes.
            device: where it runs.
            replaced: component -> what is taken for it instead of loading it; has to be there already.

        Raises:
            ConfigError: diffusers does not load it.
        """
        diffusers, given = require_diffusers(), dict(replaced or {})
        kind = getattr(diffusers, self.class_name)
        with quiet_diffusers():
            try:
                pipeline = kind.from_pretrained(self.folder, dtype=dtype, local_files_only=True, **given)
            except (OSError, ValueError, TypeError, ImportError, KeyError) as error:
                raise ConfigError(f"{self.folder}: diffusers does not load it: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.eval()  # T5 would drop numbers at random, and come out otherwise each time
                if name not in given:
                    part.to(device)
        return pipeline


def require_diffusers() -> Any:
    """The package diffusers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(f"a pipeline of diffusers needs a package that is missing: {INSTALL}") from error
    return diffusers


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep the bars and the advice of diffusers and Transformers out of the output for a while."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = ours.get_verbosity(), theirs.get_verbosity()
    bars = theirs.is_progress_bar_enabled()
    ours.disable_progress_bar()
    theirs.disable_progress_bar()
    ours.set_verbosity_error()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        ours.set_verbosity(levels[0])
        theirs.set_verbosity(levels[1])
        ours.enable_progress_bar()
        if bars:
            theirs.enable_progress_bar()
