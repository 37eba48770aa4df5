"""Models that predict: rows of tokens in, logits out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from auto_round.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
)
from auto_round.evaluate.gguf_weights import gguf_weights
from auto_round.evaluate.subject import Subject
from auto_round.inference.load_folder import LoadSettings, failures, load_whole
from auto_round.log import logger
from auto_round.models.auto_classes import auto_class, auto_class_name
from auto_round.models.roles import text_model

_SHOWN = 4


class Predictor(Protocol):
    """Whatever computes the logits of a model: Transformers or llama.cpp."""

    def logits(self, rows: Tensor) -> Tensor:
        """What follows each token but the last.

        Args:
            rows: `[rows, length]` int64.

        Returns:
            `[rows, length - 1, vocabulary]`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """How models are opened.

    Attributes:
        dtype: dtype in which they compute; None for their own.
        placement: arguments of `from_pretrained` that say where they run; none for the CPU.
        trust: run model code that lies in a folder.
        beside: folder of the model that GGUF files were made from; None where there is none.
        backend: kernels of packed layers; "torch" for the reference.
    """

    dtype: torch.dtype | None
    placement: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    beside: Path | None = None
    backend: str = "auto"


class TransformersPredictor:
    """A model of Transformers.

    Args:
        model: the model.
        rounded_to: dtype that what each of its layers gives is rounded to, as in a model of that dtype; None
            for no rounding. Processors without arithmetic of that dtype do this fast.
    """

    def __init__(self, model: Any, rounded_to: torch.dtype | None = None) -> None:
        self._model = text_model(model)
        self._rounded_to = rounded_to

    def logits(self, rows: Tensor) -> Tensor:
        """See `Predictor`."""
        with torch.inference_mode(), _rounded_outputs(self._model, self._rounded_to):
            found: Tensor = self._model(input_ids=rows.to(self._model.device), use_cache=False).logits
        return found[:, :-1]


@contextmanager
def _rounded_outputs(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round what the innermost modules of a model give, while the context lasts."""

    def rounded(module: nn.Module, inputs: Any, output: Any) -> Any:
        del module, inputs
        if isinstance(output, Tensor) and output.is_floating_point():
            return output.to(dtype).to(output.dtype)
        return output

    inner = [] if dtype is None else [part for part in model.modules() if next(part.children(), None) is None]
    handles = [part.register_forward_hook(rounded) for part in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def open_model(subject: Subject, how: Opening) -> Any:
    """The Transformers model of a folder or of a GGUF file's weights.

    Raises:
        CheckpointError: it does not load, or weights are missing.
        ConfigError: a package that its format needs is not installed.
        UnsupportedError: a GGUF file of a model that cannot be built.
    """
    if subject.is_gguf:
        return _open_gguf(subject, how)
    loading = LoadSettings(subject.method, how.dtype, how.placement, how.trust, how.backend)
    if package := loading.missing_package():
        raise ConfigError(f"Transformers loads {subject.path} with a package: pip install {package}")
    return load_whole(subject.path, loading)


def _open_gguf(subject: Subject, how: Opening) -> Any:
    """The weights of a file in the model of the folder that it was made from, or as Transformers reads it."""
    if how.beside is not None:
        try:
            model = _filled(subject.path, how.beside, how)
        except UnsupportedError as error:
            logger.info("%s is read by Transformers, since %s", subject.path, error)
        else:
            return model
    from transformers import AutoModelForCausalLM

    folder, name = subject.path.parent, subject.path.name
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=how.dtype or torch.float32, **how.placement
        ).eval()
    except Exception as error:
        raise UnsupportedError(
            f"{subject.path}: Transformers does not read this file ({type(error).__name__}: "
            f"{str(error).strip()[:200]}); name the folder that it was made from (--gguf_source), or have "
            "llama.cpp run it (--gguf_engine llama_cpp)"
        ) from error


def _filled(file: Path, folder: Path, how: Opening) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=how.trust, local_files_only=True)
    if hasattr(config, "quantization_config"):  # the file's weights are plain
        del config.quantization_config
    mapping = auto_class(auto_class_name(config))._model_mapping
    if type(config) not in mapping:
        raise UnsupportedError("the class of the model is not Transformers' own")
    dtype = how.dtype or torch.float32
    state = {name: value.to(dtype) for name, value in gguf_weights(folder, file)}
    with failures(file):
        model, found = mapping[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
            **how.placement,
        )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{file} lacks {len(missing)} weights of {folder}: {', '.join(missing[:_SHOWN])}"
        )
    return model.eval()
