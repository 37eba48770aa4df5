"""A written folder loaded as a user would load it, and one token through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import AutoRoundError, CheckpointError
from auto_round.export.hf_config import read_config
from auto_round.inference.load_folder import LoadSettings, failures, load_whole
from auto_round.log import logger
from auto_round.models.roles import text_model
from auto_round.pipeline.fitting.choose import RELOADED
from auto_round.pipeline.machine.memory import available_bytes

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Reader:
    """How a folder is read back.

    Attributes:
        method: its `quant_method`; None where it looks unquantized.
        dtype: dtype in which it computes; None for its own.
        device: where it runs.
        trust: run model code that lies in it.
    """

    method: str | None
    dtype: torch.dtype | None = None
    device: torch.device = CPU
    trust: bool = False

    def obstacle(self, folder: Path) -> str:
        """Why this machine cannot read the folder back, with a warning; empty where it can."""
        if missing := self._loading().missing_package():
            logger.warning("not verified: loading %s needs a package: pip install %s", folder, missing)
            return f"Transformers loads this format with the package {missing} only"
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        room = available_bytes()
        if room and RELOADED * size > room:
            need = f"reloading needs about {RELOADED * size >> 20} MiB of memory, {room >> 20} are free"
            logger.warning("not verified: %s: %s", folder, need)
            return need
        return ""

    def load(self, folder: Path) -> Any:
        """The model of a folder, run by the reference kernel.

        Raises:
            CheckpointError: Transformers does not load it, or finds weights missing.
        """
        with _failures(folder):
            return load_whole(folder, self._loading(), _WHAT, f". {_REPORT}")

    def _loading(self) -> LoadSettings:
        on_cpu = self.device.type == "cpu"
        placement = {} if on_cpu else {"device_map": {"": str(self.device)}}
        return LoadSettings(self.method, self.dtype, placement, self.trust)


_WHAT = "what was written"
_REPORT = "Please report this; the unfinished folder is kept"


def predict_one_token(model: Any, folder: Path) -> None:
    """Send one token through a model.

    Raises:
        CheckpointError: it does not run, or what it predicts is not finite.
    """
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), _failures(folder):
        logits = text_model(model)(input_ids=token, use_cache=False).logits
    bad = int((~logits.isfinite()).sum())
    if bad:
        raise CheckpointError(
            f"{folder}: {bad} of {logits.numel()} logits after one token are NaN or infinite. {_REPORT}"
        )


def check_loads(folder: Path, *, trust: bool = False) -> dict[str, Any]:
    """Load a folder and send one token through it, where nothing is known that it should predict.

    Returns:
        `tokens`, the number that it was asked about; or `skipped`, the reason why it was not loaded.

    Raises:
        CheckpointError: it does not load or run.
    """
    config = read_config(folder)
    if config.get("auto_map") and not trust:
        return {"skipped": "the model needs code from its folder, which was not trusted"}
    reader = Reader((config.get("quantization_config") or {}).get("quant_method"), trust=trust)
    if why := reader.obstacle(folder):
        return {"skipped": why}
    try:
        predict_one_token(reader.load(folder), folder)
    except MemoryEndedError as error:
        return {"skipped": str(error)}
    return {"tokens": 1}


class MemoryEndedError(AutoRoundError):
    """Memory ended while a folder was read back: nothing is known of the folder."""


@contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """What other people's code raises, as errors that say which folder they are about."""
    try:
        with failures(folder, _WHAT, f". {_REPORT}"):
            yield
    except AutoRoundError:
        raise
    except Exception as error:  # memory ended: everything else is one of our errors by now
        logger.warning("not verified: memory ended while %s was reloaded", folder)
        raise MemoryEndedError("memory ended while it was reloaded") from error
