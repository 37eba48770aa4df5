"""What becomes of a family in a format: it passes, or it is refused before work with advice that works."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.models.auto_classes import auto_class, auto_class_name
from auto_round.pipeline.quantize import run
from auto_round.testing.tiny_models import tiny_tokenizer
from sweep.configurations import family_config

FORMATS = ("auto_round", "auto_gptq", "auto_awq", "llm_compressor")
METHODS: dict[str, dict[str, Any]] = {
    "tuned": {"iters": 1},
    "plain": {"iters": 0, "disable_opt_rtn": True},
}
_SHORT = {
    "group_size": 32,
    "nsamples": 8,
    "seqlen": 32,
    "batch_size": 2,
    "device_map": "cpu",
    "not_use_best_mse": True,
}
_OTHER_FORMAT = re.compile(r"use the format (\w+)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave.

    Attributes:
        family: the family.
        format: output format asked for.
        method: key of `METHODS`.
        refused: why it was not done; empty when it was.
        packed: quantized matrices.
        kept: matrices of blocks that are not, by the plan.
        verified: what reloading gave.
    """

    family: str
    format: str
    method: str
    refused: str = ""
    packed: int = 0
    kept: int = 0
    verified: dict[str, Any] | None = None

    @property
    def unloaded(self) -> str:
        """Why the folder was not loaded; empty when it was, and where there is none."""
        return str((self.verified or {}).get("skipped", ""))


def save_family(family: str, folder: Path) -> Path:
    """Write a tiny random model of a family with a tokenizer of bytes."""
    return save_config(family_config(family), folder)


def save_config(config: Any, folder: Path) -> Path:
    """Write a random model of a configuration with a tokenizer of bytes."""
    torch.manual_seed(0)
    made = auto_class(auto_class_name(config))
    model = made.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif not parameter.isfinite().all():
                parameter.fill_(1.0)
            elif re.search(r"norm|ln_", name) and name.endswith("weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.isfinite().all():
                buffer.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows() -> list[list[int]]:
    """Token rows for tuning and measuring."""
    return torch.randint(3, 120, (12, 32), generator=torch.Generator().manual_seed(3)).tolist()


def sweep(
    model: Path,
    family: str,
    fmt: str,
    method: str,
    out: Path,
    dataset: list[Any] | None = None,
    **more: Any,
) -> Outcome:
    """Quantize one model with `rows` or other data, and further options; what came of it.

    Raises:
        Exception: whatever is no refusal.
    """
    given = {**_SHORT, **METHODS[method], "model": str(model), "output_dir": str(out), "format": fmt, **more}
    data = (dataset or rows()) if method == "tuned" else None
    try:
        result = run(build_options(given), dataset=data)
    except UnsupportedError as error:
        return Outcome(family, fmt, method, refused=str(error))
    kept = sum(1 for name in result.plan.kept if ".layers." in name or ".h." in name)
    checked = result.report["verified"][fmt]
    return Outcome(family, fmt, method, "", len(result.plan.quantized), kept, checked)


def advised(outcome: Outcome) -> tuple[str, str] | None:
    """Format and method that a refusal, or a folder for others to load, advises; None for none of ours."""
    advice = outcome.refused or outcome.unloaded
    plain = "--recipe rtn" in advice
    other = _OTHER_FORMAT.search(advice)
    if not plain and other is None:
        return None
    return other[1] if other else outcome.format, "plain" if plain else outcome.method
