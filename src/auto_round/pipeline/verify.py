"""Verification: the folder is reloaded from disk and must predict what the tuned model predicted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.rows import TokenRow
from auto_round.errors import CheckpointError
from auto_round.evaluate.logits import Comparison, positions_at_once
from auto_round.inference.convert_model import change_backend
from auto_round.log import logger
from auto_round.pipeline.job import Job
from auto_round.pipeline.measure import Measured, counted
from auto_round.pipeline.memory import available_bytes, release_freed_memory

ROWS = 4
POSITIONS = 512
LOGITS_BYTES = 128 << 20
"""Rows compared, and most positions of each: fewer when their logits would not fit into so many bytes."""
LARGEST_KL = 1e-3
"""Divergence that 16-bit arithmetic in another order may cause, nats per token; an error of one code in
one layer of a small model gives more (docs/LOG.md)."""
PROMPT_TOKENS = 16
NEW_TOKENS = 32


def verify_folder(job: Job, name: str, folder: Path, measured: Measured | None) -> dict[str, Any] | None:
    """Reload one output with Transformers and compare; None when there is nothing to compare with.

    Returns:
        `kl`, `largest_difference` (of logits), `same_top_token` and a generated `sample`.

    Raises:
        CheckpointError: what was reloaded predicts something else.
    """
    if measured is None or job.rows is None:
        return None
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    room = available_bytes()
    if room and 2 * size > room:
        logger.warning("not verified: reloading %s needs about %d MiB of memory", folder, 2 * size >> 20)
        return None
    release_freed_memory()
    model = _load(job, name, folder)
    held_out = job.rows.rows[job.tuned :]
    comparison, largest = _compare(job, model, measured, held_out[:ROWS])
    if not comparison.kl <= LARGEST_KL:
        raise CheckpointError(
            f"{folder}: what was written does not predict what was tuned: KL {comparison.kl:.3g} nats per "
            f"token (at most {LARGEST_KL}), largest difference of logits {largest:.3g}. Please report this; "
            "the unfinished folder is kept"
        )
    return {
        "kl": comparison.kl,
        "largest_difference": largest,
        "same_top_token": comparison.agreement,
        "sample": _generate(job, model, held_out[0].input_ids[:PROMPT_TOKENS]),
    }


def _compare(job: Job, model: Any, measured: Measured, rows: Sequence[TokenRow]) -> tuple[Comparison, float]:
    """The tuned model's logits against the reloaded model's, and the largest difference of any two."""
    comparison, largest = Comparison(), 0.0
    vocabulary = int(job.source.config.get_text_config().vocab_size)
    step = positions_at_once(vocabulary)
    affordable = LOGITS_BYTES // (len(rows) * vocabulary * job.dtype.itemsize)
    length = min(POSITIONS, len(rows[0].input_ids), max(PROMPT_TOKENS, affordable))
    ids = torch.stack([row.input_ids[:length] for row in rows]).to(job.device)
    masks = None
    if any(row.mask is not None for row in rows):
        whole = torch.ones(length, dtype=torch.bool)
        masks = torch.stack([whole if row.mask is None else row.mask[:length] for row in rows]).to(job.device)
    with job.source.stem(job.device, job.dtype) as stem, torch.no_grad():
        reloaded = model(input_ids=ids, attention_mask=masks, use_cache=False).logits
        for i, row in enumerate(rows):
            for start in range(0, length - 1, step):
                end = min(start + step, length - 1)
                hidden = measured.final_hidden[i : i + 1, start:end].to(job.device)
                wanted = stem.finish(hidden, measured.head)[0]
                real = counted(row, start, end)
                where = None if real is None else real.to(job.device)
                comparison.add(wanted, reloaded[i, start:end], ids[i, start + 1 : end + 1], where)
                largest = max(largest, float((wanted.float() - reloaded[i, start:end].float()).abs().max()))
    return comparison, largest


def _load(job: Job, name: str, folder: Path) -> Any:
    """The folder as a user would load it, with the reference kernel and in the dtype of tuning."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    settings: dict[str, Any] = {"dtype": job.dtype}
    if job.exporters[name].config(job.plan, job.source.layers, job.source.blocks) is not None:
        settings["quantization_config"] = AutoRoundConfig(backend="torch")
    if job.device.type != "cpu":
        settings["device_map"] = {"": str(job.device)}
    trust = job.options.model.trust_remote_code
    with warnings.catch_warnings():
        # Transformers warns that only the backend of what is passed will be used: that is what is meant.
        warnings.simplefilter("ignore", UserWarning)
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **settings).eval()


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
