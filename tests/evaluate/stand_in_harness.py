"""A stand-in for lm-evaluation-harness: it knows a few tasks, and notes what it was asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest

KNOWN = ("arc_easy", "arc_challenge", "mmlu_law", "mmlu_logic", "piqa")


@dataclass
class Harness:
    """What it was asked for, and what it answers.

    Attributes:
        calls: keyword arguments of each evaluation.
        scanned: arguments of each reading of task files.
        right: task -> which questions are answered right, for the next evaluations.
        fails: (task, questions at once) -> error that it raises.
        fetched: tasks whose data were asked for.
        no_data: task -> error where its data are asked for.
        engines: arguments of each vLLM model.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    scanned: list[dict[str, Any]] = field(default_factory=list)
    right: list[dict[str, list[float]]] = field(default_factory=list)
    fails: dict[tuple[str, Any], Exception] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    no_data: dict[str, Exception] = field(default_factory=dict)

    def evaluate(self, **given: Any) -> dict[str, Any]:
        self.calls.append(given)
        for task in given["tasks"]:
            if error := self.fails.get((task, given["model"].batch_size)):
                raise error
        right = self.right.pop(0) if self.right else {}
        answers = {task: right.get(task, [1.0, 0.0]) for task in given["tasks"]}
        return {
            "results": {
                task: {"alias": f" - {task}", "acc,none": sum(found) / len(found), "acc_stderr,none": "N/A"}
                for task, found in answers.items()
            },
            "versions": dict.fromkeys(answers, 2),
            "n-shot": dict.fromkeys(answers, 0),
            "n-samples": {task: {"original": 9, "effective": len(found)} for task, found in answers.items()},
            "samples": {
                task: [{"doc_id": i, "acc": value} for i, value in enumerate(found)]
                for task, found in answers.items()
            },
        }

    def fetch(self, names: list[str], manager: Any) -> dict[str, Any]:
        self.fetched += names
        for name in names:
            if error := self.no_data.get(name):
                raise error
        return dict.fromkeys(names)


def stand_in(monkeypatch: pytest.MonkeyPatch, *, vllm: bool = True) -> Harness:
    """Put the stand-in in place of the harness, with or without vLLM."""
    harness = Harness()

    class Manager:
        def __init__(self, **given: Any) -> None:
            harness.scanned.append(given)
            own = ["mine"] if given["include_path"] else []
            self.all_tasks = [*own, *(KNOWN if given["include_defaults"] else ())]

    class Model:
        def __init__(self, **given: Any) -> None:
            vars(self).update(given)

    class Engine(Model):
        batch_size = "auto"

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            harness.engines.append(given)

    def pairs(text: str) -> dict[str, str]:
        return dict(part.split("=") for part in text.split(",") if part)

    contents = {
        "lm_eval": {"simple_evaluate": harness.evaluate},
        "lm_eval.tasks": {"TaskManager": Manager, "get_task_dict": harness.fetch},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Model},
        "lm_eval.models.vllm_causallms": {"VLLM": Engine},
        "lm_eval.utils": {"simple_parse_args_string": pairs},
        **({"vllm": {}} if vllm else {}),
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = __import__("importlib.machinery", fromlist=["x"]).ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return harness
