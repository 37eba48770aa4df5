"""Whether a model fits into memory as a whole, so that it can write its own calibration text."""

from __future__ import annotations

from functools import partial

import torch

from auto_round.calibration.self_text import AT_ONCE, SelfText
from auto_round.config import cache_folder
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.tensor import dtype_name
from auto_round.models.source import ModelSource
from auto_round.pipeline.deciding.open_model import Opened
from auto_round.pipeline.fitting.choose import DEVICE_SHARE
from auto_round.pipeline.machine.memory import available_bytes, device_total_bytes
from auto_round.units import size

LOGITS = 4
"""Numbers in float32 for each token of the vocabulary that drawing the next one of a row holds."""
HOST_SHARE = 0.9
"""Share of the free memory of a host that may be taken."""


def own_text(opened: Opened, device: torch.device, dtype: torch.dtype) -> SelfText:
    """Who writes the model's own text, where a data set asks for it.

    Args:
        opened: model and tokenizer.
        device: where it runs.
        dtype: dtype in which it runs.
    """
    wanted, source = opened.options.calibration, opened.source
    return SelfText(
        source=source,
        tokenizer=opened.tokenizer,
        device=device,
        dtype=dtype,
        folder=cache_folder() / "self",
        seqlen=wanted.seqlen,
        seed=wanted.seed,
        rows_at_once=partial(rows_beside_model, source, device, dtype, wanted.seqlen),
    )


def rows_beside_model(source: ModelSource, device: torch.device, dtype: torch.dtype, seqlen: int) -> int:
    """How many rows the whole model can write at once.

    Raises:
        UnsupportedError: not even one beside its weights.
    """
    weights = dtype.itemsize * sum(spec.count for spec in source.tensors.values())
    row = seqlen * dtype.itemsize * source.facts.cached_by_token + 4 * LOGITS * source.facts.vocabulary
    on_host = device.type == "cpu"
    free = HOST_SHARE * available_bytes() if on_host else DEVICE_SHARE * device_total_bytes(device)
    if not free:  # nobody tells
        return AT_ONCE
    rows = int((free - weights) // max(1, row))
    if rows < 1:
        raise UnsupportedError(
            "the model cannot write its own calibration text here",
            [
                Refusal(
                    "self",
                    f"it needs {size(weights)} for all weights in {dtype_name(dtype)} and "
                    f"{size(row)} for each row, and {device} has {size(free)}: one block at a time would be "
                    "read again for every token",
                    "write the text on a machine that holds the model (the same --dataset self there says "
                    "where the file is) and give the file, or take other text: --dataset FILE.jsonl",
                )
            ],
        )
    return min(AT_ONCE, rows)
