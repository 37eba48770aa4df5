"""The check that a written folder reloads, and predicts what the tuned model predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import CheckpointError, InternalError
from auto_round.evaluate.logits import Comparison
from auto_round.export.exporter import Exporter
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.facts.inputs import expert_of
from auto_round.facts.layer import Role
from auto_round.inference.convert_model import change_backend
from auto_round.log import logger
from auto_round.models import matrix_experts
from auto_round.models.causal_attention import install
from auto_round.models.source import ModelSource
from auto_round.numerics.activation import ActivationFormat
from auto_round.numerics.activation_float import CalibratedScale, InputFormat
from auto_round.numerics.head_steps import HeadSteps
from auto_round.pipeline.checking.compare_rows import PROMPT_TOKENS, batches, compare
from auto_round.pipeline.checking.reload import MemoryEndedError, Reader, predict_one_token
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.machine.memory import release_freed_memory
from auto_round.pipeline.running.attention_states import rounded_states
from auto_round.pipeline.running.input_ranges import NO_RANGES, InputRanges
from auto_round.pipeline.running.measure import Measured
from auto_round.tuning.quantized_inputs import quantized_inputs

LARGEST_KL = 1e-3
"""Divergence that 16-bit arithmetic in another order may cause, nats per token; an error of one code in
one layer of a small model gives more (docs/LOG.md)."""
FINE = 128
"""Activation formats count as fine when their largest number is at least so many steps: whole numbers of 8
bits have as many, FP8 has 14 (caches are made of it, too). Those with one step for all tokens never do: the
largest activation decides on it, and leaves most tokens few steps."""
LARGEST_KL_COARSE = 3e-2
"""The same where activations are rounded more coarsely: the smallest difference in front of the border
between two codes moves an input by a whole step (0.01 on random models of two blocks with 4 bits, 0.003 on a
trained one of eight blocks with FP8, 0.004 with 8 bits and one step for all tokens; 0 in float32)."""
FLIPPED_SHARE = 1 / 32
"""Share of the positions that may go to other experts than when the model was tuned."""
LARGEST_KL_FLIPPED = 3e-2
"""Divergence that these may cause over all positions, nats per token."""
NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class TunedModel:
    """What was tuned, as exporters compare it with what they wrote; see `export.verification.WrittenRun`.

    Attributes:
        job: the run.
        measured: the tuned model's last hidden states for the held-out rows; None without data.
        ranges: largest magnitudes of inputs, where numbers follow from them.
        states: attention module -> part -> its steps, where these are calibrated.
    """

    job: Job
    measured: Measured | None
    ranges: InputRanges = NO_RANGES
    states: Mapping[str, Mapping[str, HeadSteps]] = field(default_factory=dict)

    @property
    def source(self) -> ModelSource:
        """The original model."""
        return self.job.source

    @property
    def norms_tuned(self) -> bool:
        """Norm weights and biases are no longer the source's."""
        return self.job.tune.tune_norm_bias or bool(self.job.fresh)

    def reload(self, folder: Path, exporter: Exporter) -> dict[str, Any]:
        """Reload one output with Transformers and compare.

        Returns:
            `kl`, `largest_difference` (of logits), `same_top_token` and a generated `sample` (empty with the
            reason in `no_sample`); `tokens` where there is nothing to compare with: as many went through the
            model; or `skipped`, the reason why it was not loaded.

        Raises:
            CheckpointError: it does not load, or predicts something else.
        """
        job = self.job
        config = exporter.config(job.plan, job.source.layers, job.source.blocks)
        method = None if config is None else config["quant_method"]
        reader = Reader(method, job.dtype, job.device, job.trusts_code)
        if why := reader.obstacle(folder):
            return {"skipped": why}
        try:
            if self.measured is None or job.rows is None:
                predict_one_token(reader.load(folder), folder)
                return {"tokens": 1}
            return _compared(self, reader, folder, self.measured, self._left_alone(method))
        except MemoryEndedError as error:
            return {"skipped": str(error)}

    def _left_alone(self, method: str | None) -> dict[str, ActivationFormat]:
        """Inputs that the reader of a folder does not round -> what they are rounded to.

        A folder of dense weights does not say how. compressed-tensors 0.20 has no layers for experts:
        Transformers unpacks their matrices.
        """
        formats = self.ranges.formats(_activations(self.job))
        if method is None:
            return formats
        if method != COMPRESSED_TENSORS:
            return {}
        return {name: fmt for name, fmt in formats.items() if expert_of(name) is not None}

    def held_out(self, most: int) -> Tensor | None:
        """The first tokens of a row that was not tuned on, `[at most most]` int64; None without data."""
        if self.measured is None or self.job.rows is None:
            return None
        return self.job.held_out[0].tokens[:most]

    def compare(self, ids: Tensor, logits: Tensor) -> dict[str, float]:
        """Another reader's predictions for `held_out` tokens beside those of the tuned model."""
        if self.measured is None:
            raise InternalError("there is nothing to compare with")
        job, length = self.job, len(ids) - 1
        with job.source.stem(job.device, job.dtype) as stem:
            hidden = self.measured.final_hidden[:1, :length].to(job.device)
            ours = stem.finish(hidden, self.measured.head)[0]
        comparison = Comparison()
        comparison.add(ours.cpu().float(), logits, ids[1:].cpu(), None)
        return {
            "kl": comparison.kl,
            "perplexity": comparison.perplexity,
            "perplexity_tuned": comparison.perplexity_reference,
            "same_top_token": comparison.agreement,
        }


def _compared(
    tuned_model: TunedModel,
    reader: Reader,
    folder: Path,
    measured: Measured,
    inputs: Mapping[str, ActivationFormat],
) -> dict[str, Any]:
    """Figures of a reloaded folder on held-out rows, and a sample.

    Keys and values are rounded here where their scales are calibrated: not every release of Transformers has
    that done, and rounding twice is rounding once.

    Args:
        tuned_model: what was tuned.
        reader: loads the folder.
        folder: what was written.
        measured: the tuned model on these rows.
        inputs: module -> what its input has to be rounded to here.
    """
    job = tuned_model.job
    asked = batches(job, measured)
    release_freed_memory()
    model = reader.load(folder)
    install(model)  # rounded by another program, attention alone can make up a tenth of the bound
    if any(expert_of(name) is not None for name in inputs):
        matrix_experts.install(model)
    with quantized_inputs(model, inputs), rounded_states(model, tuned_model.states):
        comparison = Comparison()
        found = [compare(job, model, batch, comparison) for batch in asked]
        largest = max(size for size, _ in found)
        each = torch.cat([part for _, parts in found for part in parts])
        limit = _largest_kl(job)
        if not (comparison.kl <= limit or (_routes(job) and _few_flips(each, limit))):
            raise CheckpointError(
                f"{folder}: what was written does not predict what was tuned: KL {comparison.kl:.3g} nats "
                f"per token (at most {limit}), largest difference of logits {largest:.3g}. Please report "
                "this; the unfinished folder is kept"
            )
        sample = _sample(job, model)
    return {
        "kl": comparison.kl,
        "largest_difference": largest,
        "same_top_token": comparison.agreement,
        **sample,
    }


def _routes(job: Job) -> bool:
    """Whether the model sends tokens to some of its experts."""
    return any(layer.role is Role.EXPERT for layer in job.source.layers) or bool(job.source.facts.experts)


def _few_flips(each: Tensor, limit: float) -> bool:
    """Whether a divergence is small once a few positions are left out, and not large with them.

    Two experts may be as good as equal for a token: then the last bit of a number decides, and another order
    of additions sends the token elsewhere. An error of weights is seen at every token that reaches them:
    more than the share that is left out here, since 8 of 128 experts get a sixteenth of the tokens.

    Args:
        each: divergence of each position, nats, `[positions]`.
        limit: what the mean of the others may be.
    """
    count = math.ceil(FLIPPED_SHARE * len(each))
    others = each.sort().values[: len(each) - count]
    return bool(len(others)) and float(others.mean()) <= limit and float(each.mean()) <= LARGEST_KL_FLIPPED


def _largest_kl(job: Job) -> float:
    """Divergence up to which a reloaded folder counts as the same model, nats per token."""
    formats = _activations(job).values()
    coarse = any(fmt.end_steps < FINE or isinstance(fmt, CalibratedScale) for fmt in formats)
    return LARGEST_KL_COARSE if coarse or job.caches is not None else LARGEST_KL


def _activations(job: Job) -> dict[str, InputFormat]:
    """What inputs are rounded to, by module."""
    return activation_formats(job.plan, job.source.layers)


def _sample(job: Job, model: Any) -> dict[str, str]:
    """A few tokens after a held-out prompt, the most likely ones, by the kernels that a user gets.

    A text that cannot be made says nothing against the folder: the settings of generation are the source's.
    """
    if job.tokenizer is None:
        return {"sample": "", "no_sample": "there is no tokenizer"}
    texts = [row.tokens for row in job.held_out if not row.beside_text]
    if not texts:
        return {"sample": "", "no_sample": "all rows held out have images"}
    change_backend(model)
    try:
        return {"sample": _generate(job, model, texts[0][:PROMPT_TOKENS])}
    except Exception as error:  # noqa: BLE001  code of the model, of Transformers and of its user's files
        why = f"{type(error).__name__}: {str(error).strip()[:200]}"
        logger.warning("no sample text was made (%s); the folder is as it should be", why)
        return {"sample": "", "no_sample": why}


def _generate(job: Job, model: Any, prompt: Tensor) -> str:
    context = job.source.facts.context
    count = NEW_TOKENS if context is None else min(NEW_TOKENS, context - len(prompt))
    if count < 1:
        raise ValueError(f"the model's context of {context} tokens is full")
    ids = prompt.unsqueeze(0).to(job.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        tokenizer=job.tokenizer,  # finds strings at which to stop
    )
    text: str = job.tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def verify_all(
    job: Job,
    folders: Mapping[str, Path],
    measured: Measured | None,
    ranges: InputRanges = NO_RANGES,
    states: Mapping[str, Mapping[str, HeadSteps]] | None = None,
) -> dict[str, Any]:
    """Verify every output; format name -> figures."""
    tuned = TunedModel(job, measured, ranges, states or {})
    return {name: job.exporters[name].verify(folder, tuned) for name, folder in folders.items()}
