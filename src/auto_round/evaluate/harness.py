"""A model on tasks of lm-evaluation-harness, by Transformers or by vLLM."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from auto_round.config import EvaluationOptions, ModelOptions, show_accelerators
from auto_round.errors import AutoRoundError, UnsupportedError, is_out_of_memory
from auto_round.evaluate.placement import computing_dtype, device_indices, placement
from auto_round.evaluate.predictors import Opening, open_model
from auto_round.evaluate.subject import Subject
from auto_round.evaluate.task_data import no_data
from auto_round.evaluate.task_names import Tasks
from auto_round.evaluate.vocabulary import load_tokenizer
from auto_round.export.table import plans_alone
from auto_round.facts.tensor import dtype_name
from auto_round.log import logger

ON_CPU: Final = "8"
"""Questions at once on a CPU where none are named: more gain nothing there, and memory does not end with an
error by which the harness could find a number."""
SMALLER: Final = ("8", "4", "2", "1")
"""Questions at once that are tried one after another when memory ends."""

Results = dict[str, Any]
"""What `simple_evaluate` of the harness returns."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a model achieved on tasks.

    Attributes:
        parts: results of the harness, of all tasks or task by task.
        failed: task -> why it gave nothing.
    """

    parts: tuple[Results, ...]
    failed: Mapping[str, str]


def run_tasks(tasks: Tasks, subject: Subject, model: ModelOptions, beside: Path | None = None) -> Evaluated:
    """Run a model on tasks.

    Args:
        tasks: what to run, and how.
        subject: the model.
        model: where it runs, its tokenizer, whether its code is trusted.
        beside: folder of the model that a GGUF file was made from.

    Raises:
        AutoRoundError: the model does not load, memory ends, or a task fails (not with task by task).
    """
    if tasks.options.eval_backend == "vllm":
        language_model = _vllm(tasks.options, subject, model)
        return Evaluated((_evaluate(tasks, tasks.names, language_model),), {})
    wrap = _wrapper(tasks.options, subject, model, beside)
    batch_size = _batch_size(tasks.options.eval_bs, model)
    if tasks.options.eval_task_by_task:
        return _one_by_one(tasks, wrap, batch_size)
    try:
        return Evaluated((_evaluate(tasks, tasks.names, wrap(batch_size)),), {})
    except Exception as error:
        if is_out_of_memory(error):
            raise AutoRoundError(
                "memory ended during the evaluation: ask fewer questions at once (--eval_bs 1), or let the "
                "number be found for each task (--eval_task_by_task)"
            ) from error
        raise


def check_can_run(options: EvaluationOptions, subject: Subject) -> None:
    """Refuse what a backend does not read, before work.

    Raises:
        UnsupportedError: vLLM and a GGUF file.
    """
    if options.eval_backend == "vllm" and subject.is_gguf:
        raise UnsupportedError(
            f"{subject.path}: GGUF files are evaluated by the hf backend; leave --eval_backend vllm out"
        )


def check_can_read(options: EvaluationOptions, output: str) -> None:
    """Refuse to evaluate an output format that a backend does not read, before the run that writes it.

    Raises:
        UnsupportedError: vLLM and GGUF.
    """
    if options.eval_backend == "vllm" and plans_alone(output):
        raise UnsupportedError(
            f"format {output} is evaluated by the hf backend only: leave --eval_backend vllm out, or "
            "name another format last"
        )


def _one_by_one(tasks: Tasks, wrap: Callable[[str], Any], batch_size: str) -> Evaluated:
    parts, failed = [], {}
    for name in tasks.names:
        try:
            parts.append(_with_smaller_batches(tasks, name, wrap, batch_size))
        except Exception as error:  # noqa: BLE001  a task's data and code are other people's
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            logger.warning("task %s gave nothing: %s", name, failed[name])
    return Evaluated(tuple(parts), failed)


def _with_smaller_batches(tasks: Tasks, name: str, wrap: Callable[[str], Any], batch_size: str) -> Results:
    for size in _sizes(batch_size):
        try:
            return _evaluate(tasks, (name,), wrap(size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("task %s: memory ended with --eval_bs %s", name, size)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
    raise AutoRoundError("memory ends with one question at a time")


def _sizes(first: str) -> Iterator[str]:
    """The number of questions that is asked for, and smaller ones."""
    yield first
    yield from (size for size in SMALLER if not first.isdecimal() or int(size) < int(first))


def _evaluate(tasks: Tasks, names: Sequence[str], language_model: Any) -> Results:
    """Results of some tasks.

    Raises:
        ConfigError: their data lie on a hub that cannot be reached.
    """
    from lm_eval import simple_evaluate

    options = tasks.options
    try:
        found: Results = simple_evaluate(
            model=language_model,
            tasks=list(names),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=options.eval_gen_kwargs,
            apply_chat_template=options.fewshot_as_multiturn,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            task_manager=tasks.manager,
        )
    except ConnectionError as error:
        raise no_data(dict.fromkeys(names, error), several=len(names) > 1) from error
    return found


def _wrapper(
    options: EvaluationOptions, subject: Subject, model: ModelOptions, beside: Path | None
) -> Callable[[str], Any]:
    """What makes the harness's model of a loaded one, for a number of questions at once."""
    from lm_eval.models.huggingface import HFLM

    where = placement(model.device_map)
    how = Opening(computing_dtype(options), where, model.trust_remote_code, beside)
    loaded = open_model(subject, how)
    tokenizer = load_tokenizer(
        subject, _tokenizer_name(model, subject, beside), trust=model.trust_remote_code
    )

    def wrap(batch_size: str) -> Any:
        return HFLM(
            pretrained=loaded,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
            add_bos_token=options.add_bos_token or None,
        )

    return wrap


def _vllm(options: EvaluationOptions, subject: Subject, model: ModelOptions) -> Any:
    indices = device_indices(model.device_map)
    if indices:
        show_accelerators(indices)
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.utils import simple_parse_args_string

    dtype = computing_dtype(options)
    settings: dict[str, Any] = {
        "pretrained": str(subject.path),
        "dtype": "auto" if dtype is None else dtype_name(dtype),
        "tokenizer": model.tokenizer,
        "trust_remote_code": model.trust_remote_code,
        "batch_size": "auto" if not options.eval_bs.isdecimal() else int(options.eval_bs),
        "add_bos_token": options.add_bos_token or None,
    }
    if len(indices) > 1:
        settings["tensor_parallel_size"] = len(indices)
    return VLLM(**settings | simple_parse_args_string(options.vllm_args or ""))


def _tokenizer_name(model: ModelOptions, subject: Subject, beside: Path | None) -> str | None:
    if model.tokenizer is None and subject.is_gguf and beside is not None:
        return str(beside)
    return model.tokenizer


def _batch_size(wanted: str, model: ModelOptions) -> str:
    return ON_CPU if not wanted.isdecimal() and not placement(model.device_map) else wanted
