"""How far a model's predictions are from its original's on a text, row by row.

The original runs first; its logits go to disk (`logits_cache`), so both models are in memory together only
where the disk has no room for all rows. Figures of each position are kept, logits are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.config import EvaluationOptions, FidelityOptions, ModelOptions, cache_folder
from auto_round.errors import ConfigError, NumericsError
from auto_round.evaluate.figures import halves, summarize, worst
from auto_round.evaluate.intervals import Resampling, block_numbers
from auto_round.evaluate.llama_cpp import LlamaCppPredictor
from auto_round.evaluate.llama_cpp import check_installed as check_llama_cpp
from auto_round.evaluate.logits_cache import LogitsCache, open_cache
from auto_round.evaluate.placement import computing_dtype, placement
from auto_round.evaluate.positions import Figures, compare_positions, joined, likelihoods
from auto_round.evaluate.predictors import Opening, Predictor, TransformersPredictor, open_model
from auto_round.evaluate.rows import check_text, token_rows
from auto_round.evaluate.subject import Subject, find_source, find_subject
from auto_round.evaluate.vocabulary import check_same_vocabulary, load_tokenizer
from auto_round.log import Progress, ProgressSink, ignore_progress, logger

FLOOR_ROWS = 16
"""Rows on which the original is run in another dtype."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is compared, and how: checked before any weight is read.

    Attributes:
        model: what is measured.
        original: what it is compared with; None: only its own perplexity.
        tokenizer: of Transformers.
        how: how models are opened.
        text: the file, wherever the program stands when it is read.
        options: what the user asked for.
        rows_at_once: rows that go through a model together.
        bos: token before each row; None for none.
    """

    model: Subject
    original: Subject | None
    tokenizer: Any
    how: Opening
    text: Path
    options: FidelityOptions
    rows_at_once: int = 1
    bos: int | None = None

    def rows(self) -> Tensor:
        """The text, `[rows, length]` int64."""
        options = self.options
        return token_rows(self.text, self.tokenizer, options.tokens, options.seqlen, self.bos)

    def opened(self, subject: Subject) -> Predictor:
        """A model, ready to run."""
        if self.by_llama_cpp(subject):
            return LlamaCppPredictor(subject.path, self.options.seqlen, torch.get_num_threads())
        return TransformersPredictor(open_model(subject, self.how))

    def in_another_dtype(self, subject: Subject) -> tuple[Predictor, str]:
        """A model of Transformers in bfloat16 where the user's is float32, else in float32; and which."""
        if self.how.dtype is torch.float32:
            return TransformersPredictor(open_model(subject, self.how), torch.bfloat16), "bfloat16"
        how = replace(self.how, dtype=torch.float32)
        return TransformersPredictor(open_model(subject, how)), "float32"

    def by_llama_cpp(self, subject: Subject) -> bool:
        """Whether llama.cpp computes the logits of a model: of GGUF files, where the user chose that."""
        return subject.is_gguf and self.options.gguf_engine == "llama_cpp"


def plan_measurement(
    model: ModelOptions, evaluation: EvaluationOptions, options: FidelityOptions
) -> Measurement:
    """Find the models and check everything that can be known without reading a weight.

    Raises:
        ConfigError: no such model or text, different vocabularies, a missing package or device.
        UnsupportedError: a model that cannot be read.
    """
    if options.text is None:
        raise ConfigError("no text to measure on: name it with --text FILE")
    check_text(Path(options.text))
    trust = model.trust_remote_code
    subject = find_subject(model.model, platform=model.platform, trust=trust)
    original = None
    if options.original is not None:
        original = find_subject(options.original, platform=model.platform, trust=trust)
    subjects = [s for s in (original, subject) if s is not None]
    if options.gguf_engine == "llama_cpp" and any(s.is_gguf for s in subjects):
        check_llama_cpp()
    if original is not None:
        check_same_vocabulary(original, subject, trust=trust)
    folders = [s for s in subjects if not s.is_gguf]
    named = model.tokenizer
    dtype = computing_dtype(evaluation) or torch.float32
    beside = find_source(evaluation.gguf_source, subjects, platform=model.platform, trust=trust)
    if named is None and not folders and beside is not None:
        named = str(beside)
    tokenizer = load_tokenizer((folders or subjects)[0], named, trust=trust)
    where = placement(model.device_map)
    how = Opening(dtype, where, trust, beside, backend="auto" if where else "torch")
    at_once = int(evaluation.eval_bs) if evaluation.eval_bs.isdecimal() else 1
    bos = _bos(tokenizer) if evaluation.add_bos_token else None
    text = Path(options.text).absolute()
    return Measurement(
        subject, original, tokenizer, how, text, _within_context(options, subjects), at_once, bos
    )


def _within_context(options: FidelityOptions, subjects: Sequence[Subject]) -> FidelityOptions:
    """Rows no longer than the models take."""
    context = min((length for s in subjects if (length := s.context) is not None), default=options.seqlen)
    if options.seqlen <= context:
        return options
    logger.info("rows have %d tokens, the models' context, instead of %d", context, options.seqlen)
    return replace(options, seqlen=context)


def measure(plan: Measurement, progress: ProgressSink = ignore_progress) -> dict[str, Any]:
    """Run the models and say how far apart they are; numbers as `figures.summarize` gives them.

    Raises:
        CheckpointError: a model does not load.
        NumericsError: a model predicts NaN.
    """
    rows = plan.rows()
    length, skip = rows.shape[1] - 1, plan.options.skip
    facts: dict[str, Any] = {
        "model": plan.model.name,
        "text": plan.options.text,
        "rows": len(rows),
        "row_tokens": rows.shape[1],
        "skipped": skip,
        "dtype": str(plan.how.dtype).removeprefix("torch."),
    }
    blocks = block_numbers(len(rows), length - skip)
    resampling = Resampling(blocks, torch.Generator().manual_seed(plan.options.seed))
    if plan.original is None:
        nll = _alone(plan, rows, progress)["nll"]
        return facts | {
            "positions": len(nll),
            "perplexity": resampling.of_means(torch.exp, nll).to_dict(),
        }
    reference = _Reference(plan, plan.original, _cache(plan, plan.original), progress)
    reference.store(rows)
    floor = _noise_floor(plan, reference, rows) if _wants_floor(plan) else None
    figures = _compared(plan, reference, plan.opened(plan.model), rows, progress)
    row_of = torch.arange(len(rows), dtype=torch.int64, device="cpu").repeat_interleave(length - skip)
    token_of = torch.arange(skip + 1, length + 1, dtype=torch.int64, device="cpu").repeat(len(rows))
    found = facts | {"original": plan.original.name} | summarize(figures, resampling)
    found |= {"halves": halves(figures, row_of), "worst": worst(figures["kl"], row_of, token_of)}
    return found | ({} if floor is None else {"noise_floor": floor})


@dataclass(slots=True)
class _Reference:
    """The original's logits, from disk or from the model itself."""

    plan: Measurement
    subject: Subject
    cache: LogitsCache
    progress: ProgressSink
    model: Predictor | None = field(default=None)

    def store(self, rows: Tensor) -> None:
        """Put the logits of rows on disk while there is room; the model stays only when some are left."""
        for number, row in enumerate(rows, 1):
            if not self.cache.has(row) and not self.cache.put(row, self._computed(row[None])[0]):
                return
            self.progress(Progress("original", number, len(rows)))
        self.model = None

    def logits(self, rows: Tensor) -> list[Tensor]:
        """Logits `[length - 1, vocabulary]` of each row."""
        found = [self.cache.get(row) for row in rows]
        missing = [i for i, logits in enumerate(found) if logits is None]
        computed = iter(self._computed(rows[missing])) if missing else iter(())
        return [next(computed) if logits is None else logits for logits in found]

    def _computed(self, rows: Tensor) -> Tensor:
        if self.model is None:
            self.model = self.plan.opened(self.subject)
        return self.model.logits(rows)


def _compared(
    plan: Measurement, reference: _Reference, candidate: Predictor, rows: Tensor, progress: ProgressSink
) -> Figures:
    parts = []
    for start, batch in _batches(rows, plan.rows_at_once):
        found = candidate.logits(batch)
        for row, first, second in zip(batch, reference.logits(batch), found, strict=True):
            parts.append(_positions(plan, row, first, second))
        progress(Progress("compare", start + len(batch), len(rows)))
    return joined(parts)


def _positions(plan: Measurement, row: Tensor, first: Tensor, second: Tensor) -> Figures:
    skip = plan.options.skip
    if first.shape != second.shape:
        raise ConfigError(
            f"{plan.model.name} gives {second.shape[-1]} logits for a token and its original "
            f"{first.shape[-1]}: only models with the same vocabulary can be compared"
        )
    figures = compare_positions(first[skip:], second[skip:], row[skip + 1 :])
    _check_finite(figures["kl"], plan.model.name)
    return figures


def _alone(plan: Measurement, rows: Tensor, progress: ProgressSink) -> Figures:
    model, skip = plan.opened(plan.model), plan.options.skip
    parts = []
    for start, batch in _batches(rows, plan.rows_at_once):
        for row, logits in zip(batch, model.logits(batch), strict=True):
            parts.append(likelihoods(logits[skip:], row[skip + 1 :]))
            _check_finite(parts[-1]["nll"], plan.model.name)
        progress(Progress("compare", start + len(batch), len(rows)))
    return joined(parts)


def _wants_floor(plan: Measurement) -> bool:
    return (
        plan.options.noise_floor == "dtype"
        and plan.original is not None
        and not plan.by_llama_cpp(plan.original)
    )


def _noise_floor(plan: Measurement, reference: _Reference, rows: Tensor) -> dict[str, Any]:
    """The original against itself in another dtype, on the first rows."""
    other, dtype = plan.in_another_dtype(reference.subject)
    rows = rows[:FLOOR_ROWS]
    figures = _compared(plan, reference, other, rows, _renamed(reference.progress, "floor"))
    return {
        "dtype": dtype,
        "rows": len(rows),
        "kl": float(figures["kl"].mean()),
        "same_top": float(figures["same_top"].mean()),
        "probability_difference_rms": float(figures["difference"].square().mean().sqrt()),
    }


def _renamed(progress: ProgressSink, stage: str) -> ProgressSink:
    def report(event: Progress) -> None:
        progress(Progress(stage, event.done, event.total))

    return report


def _cache(plan: Measurement, original: Subject) -> LogitsCache:
    import transformers

    options = plan.options
    root = Path(options.cache_dir) if options.cache_dir else cache_folder() / "logits"
    where = str(sorted(plan.how.placement.items()))
    engine = options.gguf_engine if original.is_gguf else "torch"
    how = [str(plan.how.dtype), where, engine, torch.__version__, transformers.__version__]
    return open_cache(root, options.cache_size, original, how)


def _batches(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    yield from ((start, rows[start : start + size]) for start in range(0, len(rows), size))


def _bos(tokenizer: Any) -> int:
    token = tokenizer.bos_token_id
    if token is None:
        raise ConfigError("add_bos_token: the tokenizer has no token that begins a text; leave it out")
    return int(token)


def _check_finite(values: Tensor, name: str) -> None:
    if bad := int((~values.isfinite()).sum()):
        raise NumericsError(f"{name}: {bad} of {len(values)} predictions of a row are NaN or infinite")
