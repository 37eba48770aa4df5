"""Verification: the folder is reloaded from disk and must predict what the tuned model predicted."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.calibration.rows import TokenRow
from auto_round.errors import CheckpointError
from auto_round.evaluate.logits import Comparison, positions_at_once
from auto_round.export.gguf.exporter import GgufExporter
from auto_round.inference.convert_model import change_backend
from auto_round.log import logger
from auto_round.numerics.activation import ActivationFormat
from auto_round.pipeline.activations import activation_formats
from auto_round.pipeline.job import Job
from auto_round.pipeline.measure import Measured, counted
from auto_round.pipeline.memory import available_bytes, release_freed_memory
from auto_round.pipeline.verify_gguf import verify_gguf
from auto_round.tuning.quantized_inputs import quantized_inputs

ROWS = 4
POSITIONS = 512
LOGITS_BYTES = 64 << 20
"""Rows compared, and most positions of each: fewer when their logits would not fit into so many bytes."""
LARGEST_KL = 1e-3
"""Divergence that 16-bit arithmetic in another order may cause, nats per token; an error of one code in
one layer of a small model gives more (docs/LOG.md)."""
LARGEST_KL_FEW_BITS = 3e-2
"""The same where activations of fewer than 8 bits are rounded: the smallest difference in front of the border
between two codes moves an input by a whole step (0.01 on random models of two blocks)."""
PROMPT_TOKENS = 16
NEW_TOKENS = 32


def verify_folder(job: Job, name: str, folder: Path, measured: Measured | None) -> dict[str, Any] | None:
    """Reload one output with Transformers and compare; None when there is nothing to compare with.

    Returns:
        `kl`, `largest_difference` (of logits), `same_top_token` and a generated `sample`; or `skipped`, the
        reason why nothing was compared.

    Raises:
        CheckpointError: what was reloaded predicts something else.
    """
    exporter = job.exporters[name]
    if isinstance(exporter, GgufExporter):
        return verify_gguf(job, exporter, folder, measured)
    if measured is None or job.rows is None:
        return None
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    room = available_bytes()
    if room and 2 * size > room:
        logger.warning("not verified: reloading %s needs about %d MiB of memory", folder, 2 * size >> 20)
        return None
    config = exporter.config(job.plan, job.source.layers, job.source.blocks)
    method = None if config is None else config["quant_method"]
    missing = _missing_package(method)
    if missing:
        logger.warning("not verified: loading %s needs a package: pip install %s", folder, missing)
        return {"skipped": f"Transformers loads this format with the package {missing} only"}
    held_out = job.rows.rows[job.tuned :]
    ids = _prompts(job, held_out[:ROWS])
    tuned = _tuned_logits(job, measured, ids)
    release_freed_memory()
    model = _load(job, method, folder)
    with quantized_inputs(model, _own_activations(job, method)):
        comparison, largest = _compare(job, model, tuned, ids, held_out[:ROWS])
        limit = _largest_kl(job)
        if not comparison.kl <= limit:
            raise CheckpointError(
                f"{folder}: what was written does not predict what was tuned: KL {comparison.kl:.3g} nats "
                f"per token (at most {limit}), largest difference of logits {largest:.3g}. Please report "
                "this; the unfinished folder is kept"
            )
        sample = _generate(job, model, held_out[0].input_ids[:PROMPT_TOKENS])
    return {
        "kl": comparison.kl,
        "largest_difference": largest,
        "same_top_token": comparison.agreement,
        "sample": sample,
    }


def _largest_kl(job: Job) -> float:
    """Divergence up to which a reloaded folder counts as the same model, nats per token."""
    bits = [fmt.bits for fmt in activation_formats(job.plan, job.source.layers).values()]
    return LARGEST_KL_FEW_BITS if min(bits, default=_BYTE) < _BYTE else LARGEST_KL


_BYTE = 8


def _prompts(job: Job, rows: Sequence[TokenRow]) -> Tensor:
    """Tokens that are compared, `[rows, length]`: as many positions as their logits may take memory."""
    vocabulary = int(job.source.config.get_text_config().vocab_size)
    affordable = LOGITS_BYTES // (len(rows) * vocabulary * job.dtype.itemsize)
    length = min(POSITIONS, len(rows[0].input_ids), max(PROMPT_TOKENS, affordable))
    return torch.stack([row.input_ids[:length] for row in rows]).to(job.device)


def _tuned_logits(job: Job, measured: Measured, ids: Tensor) -> Tensor:
    """What the tuned model predicts after all but the last token: `[rows, length - 1, vocabulary]`."""
    vocabulary = int(job.source.config.get_text_config().vocab_size)
    count, length = ids.shape[0], ids.shape[1] - 1
    logits = torch.empty(count, length, vocabulary, dtype=job.dtype, device=job.device)
    step = positions_at_once(vocabulary)
    with job.source.stem(job.device, job.dtype) as stem:
        for row in range(count):
            for start in range(0, length, step):
                hidden = measured.final_hidden[row : row + 1, start : min(start + step, length)]
                found = stem.finish(hidden.to(job.device), measured.head)[0]
                logits[row, start : start + found.shape[0]] = found
    return logits


def _compare(
    job: Job, model: Any, tuned: Tensor, ids: Tensor, rows: Sequence[TokenRow]
) -> tuple[Comparison, float]:
    """The tuned model's logits against the reloaded model's, and the largest difference of any two."""
    comparison, largest = Comparison(), 0.0
    length = ids.shape[1]
    masks = None
    if any(row.mask is not None for row in rows):
        whole = torch.ones(length, dtype=torch.bool, device="cpu")
        masks = torch.stack([whole if row.mask is None else row.mask[:length] for row in rows]).to(job.device)
    with torch.no_grad():
        reloaded = model(input_ids=ids, attention_mask=masks, use_cache=False).logits
    step = positions_at_once(tuned.shape[-1])
    for i, row in enumerate(rows):
        for start in range(0, length - 1, step):
            end = min(start + step, length - 1)
            real = counted(row, start, end)
            where = None if real is None else real.to(job.device)
            wanted, got = tuned[i, start:end], reloaded[i, start:end]
            comparison.add(wanted, got, ids[i, start + 1 : end + 1], where)
            largest = max(largest, float((wanted.float() - got.float()).abs().max()))
    return comparison, largest


_PACKAGES = {"compressed-tensors": ("compressed_tensors", "compressed-tensors")}
"""`quant_method` that Transformers loads with another package -> its module, and its name to install it."""


def _missing_package(method: str | None) -> str:
    """Package without which Transformers does not load an output; empty when nothing is missing."""
    module, package = _PACKAGES.get(method or "", ("", ""))
    return package if module and importlib.util.find_spec(module) is None else ""


def _own_activations(job: Job, method: str | None) -> dict[str, ActivationFormat]:
    """Inputs that have to be rounded here since the folder does not say so: it keeps dense weights only."""
    return {} if method is not None else activation_formats(job.plan, job.source.layers)


def _load(job: Job, method: str | None, folder: Path) -> Any:
    """The folder as a user would load it, with the reference kernel and in the dtype of tuning.

    Args:
        job: the run.
        method: its `quant_method`; None where it looks unquantized.
        folder: the folder.
    """
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    # Other packages hold scales in the dtype of the model: one narrower than its own would round them.
    settings: dict[str, Any] = {"dtype": "auto" if method in _PACKAGES else job.dtype}
    if method is not None and method not in _PACKAGES:
        settings["quantization_config"] = AutoRoundConfig(backend="torch")
    if job.device.type != "cpu":
        settings["device_map"] = {"": str(job.device)}
    trust = job.options.model.trust_remote_code
    with warnings.catch_warnings():
        # Transformers warns that only the backend of what is passed will be used: that is what is meant.
        warnings.simplefilter("ignore", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **settings).eval()
    if model.dtype is not job.dtype:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=job.device))  # unpacks its weights
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(job.dtype)
    return model


def _generate(job: Job, model: Any, prompt: torch.Tensor) -> str:
    """A few tokens after a held-out prompt, the most likely ones, by the kernels that a user gets."""
    if job.tokenizer is None:
        return ""
    change_backend(model)
    ids = prompt.unsqueeze(0).to(job.device)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    text: str = job.tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def verify_all(job: Job, folders: Mapping[str, Path], measured: Measured | None) -> dict[str, Any]:
    """Verify every output; format name -> figures."""
    return {
        name: figures
        for name, folder in folders.items()
        if (figures := verify_folder(job, name, folder, measured)) is not None
    }
