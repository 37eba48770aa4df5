"""A folder loaded as a user would load it, with the kernels and in the dtype that a measurement wants."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import AutoRoundError, CheckpointError, is_out_of_memory
from auto_round.models.auto_classes import load_model
from auto_round.models.roles import text_model
from auto_round.models.skeleton import weight_dtypes

_SHOWN = 4

PACKAGES = {"compressed-tensors": ("compressed_tensors", "compressed-tensors")}
"""`quant_method` that Transformers loads with another package -> its module, and its name to install it."""


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How a folder is loaded.

    Attributes:
        method: its `quant_method`; None where it looks unquantized.
        dtype: dtype in which it computes; None for its own.
        placement: arguments of `from_pretrained` that say where it runs; none for the CPU.
        trust: run model code that lies in it.
        backend: kernels of packed layers.
    """

    method: str | None
    dtype: torch.dtype | None = None
    placement: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    backend: str = "torch"

    def missing_package(self) -> str:
        """Package without which Transformers does not load the folder; empty when nothing is missing."""
        module, package = PACKAGES.get(self.method or "", ("", ""))
        return package if module and importlib.util.find_spec(module) is None else ""


def load_folder(folder: Path, how: LoadSettings) -> tuple[Any, list[str]]:
    """The model of a folder in evaluation mode, and names of its weights that the folder lacks.

    Raises:
        Exception: whatever Transformers raises.
    """
    from transformers import AutoRoundConfig

    # Other packages hold scales in the dtype of the model: one narrower than its own would round them.
    own = how.dtype is None or how.method in PACKAGES
    settings: dict[str, Any] = {"dtype": "auto" if own else how.dtype, **how.placement}
    if how.method is not None and how.method not in PACKAGES:
        settings["quantization_config"] = AutoRoundConfig(backend=how.backend)
    with warnings.catch_warnings():
        # Transformers warns that only the backend of what is passed will be used: that is what is meant.
        warnings.simplefilter("ignore", UserWarning)
        model, found = load_model(folder, trust_remote_code=how.trust, output_loading_info=True, **settings)
    return model.eval(), sorted(found["missing_keys"])


def load_whole(folder: Path, how: LoadSettings, what: str = "it", advice: str = "") -> Any:
    """The model of a folder with all of its weights, in the dtype that is asked for.

    Args:
        folder: of any format that Transformers loads.
        how: it is loaded.
        what: was loaded, in words.
        advice: behind the reason.

    Raises:
        CheckpointError: Transformers does not load it, or weights are missing.
    """
    with failures(folder, what, advice):
        model, missing = load_folder(folder, how)
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} weights of the model are not found in it: "
                f"{', '.join(missing[:_SHOWN])}{advice}"
            )
        if how.dtype is not None and model.dtype is not how.dtype:
            with torch.no_grad():  # unpacks its weights
                text_model(model)(
                    input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False
                )
            unpacked_to(model, how.dtype)
    return model


def unpacked_to(model: Any, dtype: torch.dtype) -> None:
    """Have a model compute in a dtype that it was not loaded in; it has been run once, so it is unpacked."""
    dtypes = weight_dtypes(model, dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])


@contextmanager
def failures(path: Path, what: str = "it", advice: str = "", library: str = "Transformers") -> Iterator[None]:
    """What other people's code raises, as errors that say which model they are about.

    Args:
        path: the folder or file.
        what: what was loaded, in words.
        advice: behind the reason.
        library: what loads it.

    Raises:
        CheckpointError: anything but our own errors and the end of memory, which pass as they are.
    """
    try:
        yield
    except AutoRoundError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: {library} does not load and run {what} ({type(error).__name__}: "
            f"{str(error).strip()[:300]}){advice}"
        ) from error
