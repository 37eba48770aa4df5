"""A whole evaluation: tasks of the harness, the distance from an original, or both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from auto_round.checkpoint.disk import writing
from auto_round.config import EvaluationOptions, FidelityOptions, ModelOptions
from auto_round.config.evaluation import DEFAULT_TASKS
from auto_round.config.values import whole_path
from auto_round.errors import ConfigError
from auto_round.evaluate.fidelity import Measurement, measure, plan_measurement
from auto_round.evaluate.harness import check_can_run, run_tasks
from auto_round.evaluate.subject import Subject, find_source, find_subject
from auto_round.evaluate.task_data import fetch_data
from auto_round.evaluate.task_names import Tasks, find_tasks
from auto_round.evaluate.task_results import flips, plain_results
from auto_round.log import ProgressSink, ignore_progress


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What will be done, checked before any weight is read.

    Attributes:
        model: where models run, their tokenizer, whether their code is trusted.
        subject: the model.
        original: what it is compared with; None for nothing.
        tasks: of the harness; None for none.
        measurement: on a text; None for none.
        beside: folder whose model takes the weights of GGUF files; None for none.
        max_kl: largest mean KL that passes.
    """

    model: ModelOptions
    subject: Subject
    original: Subject | None = None
    tasks: Tasks | None = None
    measurement: Measurement | None = None
    beside: Path | None = None
    max_kl: float | None = None


def plan_evaluation(
    model: ModelOptions, evaluation: EvaluationOptions, fidelity: FidelityOptions
) -> Evaluation:
    """Find models, text and tasks; without a text and a task the usual tasks are meant.

    Raises:
        ConfigError: something is not there, a package is missing, vocabularies differ, a task is unknown or
            its data cannot be had.
        UnsupportedError: a model that cannot be read as asked.
    """
    if evaluation.tasks is None and fidelity.text is None:
        if fidelity.original is not None:
            raise ConfigError("--original is compared on a text or on tasks: name --text FILE or --tasks")
        evaluation = replace(evaluation, tasks=DEFAULT_TASKS)
    trust = model.trust_remote_code
    subject = find_subject(model.model, platform=model.platform, trust=trust)
    original = None
    if fidelity.original is not None:
        original = find_subject(fidelity.original, platform=model.platform, trust=trust)
    beside = find_source(evaluation.gguf_source, (original, subject), platform=model.platform, trust=trust)
    tasks = measurement = None
    if evaluation.tasks is not None:
        for one in (subject, original):
            if one is not None:
                check_can_run(evaluation, one)
        tasks = find_tasks(evaluation)
    if fidelity.text is not None:
        measurement = plan_measurement(model, evaluation, fidelity)
    if tasks is not None:
        fetch_data(tasks)
    if model.tokenizer:
        model = replace(model, tokenizer=whole_path(model.tokenizer))  # tasks read it later
    return Evaluation(model, subject, original, tasks, measurement, beside, fidelity.max_kl)


def evaluate(plan: Evaluation, progress: ProgressSink = ignore_progress) -> dict[str, Any]:
    """Measure the model of a plan on its text and its tasks.

    Returns:
        What `fidelity.measure` gives, with `gate` where there is a bound; `tasks` and `tasks_of_original` as
        `task_results.plain_results` gives them, with `flips` of answers where there are both.

    Raises:
        AutoRoundError: a model does not load or run.
    """
    found: dict[str, Any] = {"model": plan.subject.name}
    if plan.measurement is not None:
        found |= measure(plan.measurement, progress)
    if plan.max_kl is not None:
        found["gate"] = {"max_kl": plan.max_kl, "passed": found["kl"]["mean"]["value"] <= plan.max_kl}
    if plan.tasks is None:
        return found
    own = run_tasks(plan.tasks, plan.subject, plan.model, plan.beside)
    found["tasks"] = plain_results(own)
    if plan.original is not None:
        before = run_tasks(plan.tasks, plan.original, plan.model, plan.beside)
        found |= {"original": plan.original.name, "tasks_of_original": plain_results(before)}
        found["flips"] = flips(before, own)
    return found


def evaluate_output(tasks: Tasks, folder: Path, model: ModelOptions) -> dict[str, Any]:
    """Run a folder that was just written on tasks; `model` as it was when the folder was made.

    Returns:
        As of `evaluate`.
    """
    trust = model.trust_remote_code
    subject = find_subject(str(folder))
    check_can_run(tasks.options, subject)
    source = tasks.options.gguf_source or model.model
    beside = find_source(source, (subject,), platform=model.platform, trust=trust)
    return {"model": subject.name, "tasks": plain_results(run_tasks(tasks, subject, model, beside))}


def failed_tasks(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Tasks that failed and so have no result, of the model and of the original."""
    parts = (found.get(name, {}).get("failed", {}) for name in ("tasks", "tasks_of_original"))
    return tuple(dict.fromkeys(task for part in parts for task in part))


def as_json(found: Mapping[str, Any]) -> str:
    """The figures as JSON text."""
    return json.dumps(found, indent=2, ensure_ascii=False)


def write_json(found: Mapping[str, Any], path: Path) -> None:
    """Write the figures to a file.

    Raises:
        ConfigError: it cannot be written.
    """
    with writing(path):
        path.write_text(as_json(found) + "\n", encoding="utf-8")
