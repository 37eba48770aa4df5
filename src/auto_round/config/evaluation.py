"""Options of evaluation: tasks of a harness, and how far a model's predictions are from another's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from auto_round.config import values
from auto_round.config.groups import DTYPES
from auto_round.config.option import Spec, option, settle
from auto_round.errors import ConfigError

DEFAULT_TASKS: Final = (
    "lambada_openai",
    "hellaswag",
    "winogrande",
    "piqa",
    "mmlu",
    "wikitext",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "openbookqa",
    "boolq",
    "rte",
    "arc_easy",
    "arc_challenge",
)
"""Tasks of the harness that are run where tasks are asked for and none is named."""


def _tasks(value: Any) -> tuple[str, ...]:
    """Names of tasks; the usual ones for none."""
    return values.names(value) or DEFAULT_TASKS


def _batch_size(value: Any) -> str:
    """`"auto"`, `"auto:4"` or a number as text."""
    text = str(value).casefold()
    if isinstance(value, bool) or not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", text):
        raise ValueError('expected a whole number above zero, "auto" or "auto:N"')
    return text


def _limit(value: Any) -> float:
    """A share of the questions below 1, or a number of them."""
    words = "expected a number of questions, or a share of them below 1"
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(words) from error
    if isinstance(value, bool) or not number > 0 or (number > 1 and number != int(number)):
        raise ValueError(words)
    return number


def _size_or_none(value: Any) -> int:
    return 0 if value in (0, "0") else values.size_bytes(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Tasks of lm-evaluation-harness, run after quantizing or on a model as it is."""

    tasks: tuple[str, ...] | None = option(
        None,
        Spec(
            "tasks to run: comma list, or names one by one; without a name the usual ones",
            flags=("tasks", "task"),
            convert=_tasks,
            many=True,
        ),
    )
    include_path: str | None = option(
        None, Spec("folder of task files (.yaml) of your own; tasks may be named without the harness's")
    )
    eval_bs: str = option(
        "auto",
        Spec('questions at once: a number, "auto" or "auto:N" (found anew N times)', convert=_batch_size),
    )
    eval_task_by_task: bool = option(
        False, Spec("one task after another, each again with smaller batches when memory ends; hf only")
    )
    limit: float | None = option(
        None, Spec("first questions of each task only: a number, or a share below 1", convert=_limit)
    )
    num_fewshot: int | None = option(
        None, Spec("solved examples before each question; the task's own number when not given", low=0)
    )
    fewshot_as_multiturn: bool = option(False, Spec("examples as turns of a conversation (chat template)"))
    eval_gen_kwargs: str | None = option(
        None, Spec('settings of tasks that generate, such as "temperature=0,max_gen_toks=256"')
    )
    eval_backend: str = option("hf", Spec("what runs the model", choices=("hf", "vllm")))
    vllm_args: str | None = option(
        None, Spec('arguments of vLLM, such as "tensor_parallel_size=2,gpu_memory_utilization=0.8"')
    )
    eval_model_dtype: str | None = option(
        None,
        Spec(
            "dtype in which the evaluated model computes; its own when not given, float32 for --original",
            choices=DTYPES,
        ),
    )
    gguf_source: str | None = option(
        None,
        Spec(
            "folder or hub name of the model that GGUF files were made from, or of another of the same "
            "shape; when not given the other model, where that is a folder"
        ),
    )
    add_bos_token: bool = option(False, Spec("begin every text with the token that begins texts"))

    def __post_init__(self) -> None:
        settle(self)
        if self.eval_task_by_task and self.eval_backend != "hf":
            raise ConfigError("eval_task_by_task is for the hf backend: leave it out, or --eval_backend hf")
        if self.vllm_args and self.eval_backend != "vllm":
            raise ConfigError("vllm_args are arguments of vLLM: add --eval_backend vllm, or leave them out")


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityOptions:
    """How far a model's predictions are from those of another on a text; needs no harness."""

    original: str | None = option(
        None,
        Spec(
            "folder, hub name or GGUF file to compare with, on the text, on the tasks, or on both",
        ),
    )
    text: str | None = option(None, Spec("text to predict: .txt, .raw, or records (.jsonl, .json, .parquet)"))
    tokens: int = option(50_000, Spec("most tokens of the text", low=2))
    seqlen: int = option(512, Spec("tokens of a row", flags=("seqlen", "seq_len"), low=2))
    skip: int = option(
        0, Spec("predictions at the start of each row that do not count; llama.cpp skips half a row", low=0)
    )
    noise_floor: str = option(
        "dtype",
        Spec("the original against itself: run in another dtype, or not at all", choices=("dtype", "none")),
    )
    max_kl: float | None = option(
        None, Spec("largest mean KL, nats per token: above it the command ends with exit code 3", low=0)
    )
    gguf_engine: str = option(
        "torch",
        Spec(
            "what runs GGUF files: their weights in PyTorch, or llama.cpp, which rounds activations as well",
            choices=("torch", "llama_cpp"),
        ),
    )
    cache_size: int = option(
        "10GB",
        Spec('most disk space for logits of originals, such as "20GB"; 0 keeps none', convert=_size_or_none),
    )
    cache_dir: str | None = option(
        None, Spec("folder of these logits; among the user's caches when not given")
    )
    seed: int = option(
        42,
        Spec("seed of the draws behind intervals; tasks keep the harness's own seeds", low=0, high=2**63 - 1),
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.max_kl is not None and not (self.original and self.text):
            raise ConfigError(
                "--max_kl bounds the distance from an original on a text: name --original and --text"
            )
        if self.skip >= self.seqlen - 1:
            raise ConfigError(
                f"skip {self.skip} leaves no prediction of a row of {self.seqlen} tokens: give a smaller one"
            )
