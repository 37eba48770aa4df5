"""`auto-round eval --tasks` gives the numbers of the harness itself, and vLLM those of Transformers."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peer.ours import make
from peer.peers import DRIVERS, Peer
from pipeline.runs import quantize

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[2]
HARNESS = Peer("PEER_LM_EVAL", "lm_eval and what this package needs")
VLLM = Peer("PEER_VLLM_EVAL", "vLLM, lm_eval and what this package needs")
LIMIT = 12
BATCH = 4
VLLM_ARGS = "max_model_len=256,max_num_seqs=4,enforce_eager=True"


@dataclass(frozen=True)
class Questions:
    """Tasks made of files of questions."""

    folder: Path
    names: tuple[str, ...]

    def ask(self, peer: Peer, model: Path, out: Path, *words: str) -> dict[str, Any]:
        """What `auto-round eval` says of a model in the peer's environment."""
        command = [
            *("-m", "auto_round", "eval", str(model), "--include_path", str(self.folder)),
            *("--tasks", ",".join(self.names), "--limit", str(LIMIT), "--eval_model_dtype", "fp32"),
            *("--device", "cpu", "--output", str(out), *words),
        ]
        run_there(peer, command)
        return json.loads(out.read_text())


def run_there(peer: Peer, words: list[str]) -> str:
    """Run a Python of a peer that sees this package."""
    offline = {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [peer.python(), *words],
        env=os.environ | offline | {"PYTHONPATH": str(ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Questions:
    """Sentences of the manual whose end is to be found: a choice of four, and a continuation."""
    root = tmp_path_factory.mktemp("questions")
    text = " ".join((ROOT / "docs" / "tuning.md").read_text().split())
    sentences = [s.split() for s in text.split(". ") if 8 <= len(s.split()) <= 30][: 2 * LIMIT]
    ends = [" ".join(words[-3:]) for words in sentences]
    choices = [
        {
            "query": " ".join(words[:-3]),
            "choices": [ends[(i + j) % len(ends)] for j in range(4)],
            "gold": 0,
        }
        for i, words in enumerate(sentences)
    ]
    continuations = [
        {"context": " ".join(words[:-1]), "continuation": " " + words[-1]} for words in sentences
    ]
    for name, records in (("choices", choices), ("ends", continuations)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    script = [str(ROOT / "benchmarks" / "offline_tasks.py"), *map(str, root.glob("*.jsonl"))]
    made = run_there(HARNESS, [*script, "--out", str(root / "tasks")])
    return Questions(root / "tasks", tuple(made.split()))


def metrics(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, metric): part["value"]
        for task, result in results["tasks"].items()
        for metric, part in result["metrics"].items()
    }


def test_numbers_are_those_of_the_harness(questions: Questions, demo: Path, tmp_path: Path) -> None:
    packed = make(demo, tmp_path / "made", ("auto_round",)).folders["auto_round"]
    request = {
        "tasks": str(questions.folder),
        "names": list(questions.names),
        "folders": [str(demo), str(packed)],
        "dtype": "float32",
        "limit": LIMIT,
        "batch_size": BATCH,
        "out": str(tmp_path / "direct.json"),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    run_there(HARNESS, [str(DRIVERS / "evaluate_with_lm_eval.py"), str(tmp_path / "request.json")])
    direct = json.loads((tmp_path / "direct.json").read_text())
    words = ("--original", str(demo), "--eval_bs", str(BATCH))
    found = questions.ask(HARNESS, packed, tmp_path / "a.json", *words)
    ours = {str(packed): metrics(found), str(demo): metrics({"tasks": found["tasks_of_original"]})}
    for folder, tasks in direct.items():
        theirs = {
            (task, key.removesuffix(",none")): value
            for task, entries in tasks.items()
            for key, value in entries.items()
            if key.endswith(",none") and "stderr" not in key
        }
        assert ours[folder] == pytest.approx(theirs, rel=1e-6)
    assert found["flips"].keys() == set(questions.names)


def test_a_gguf_file(questions: Questions, demo: Path, tmp_path: Path) -> None:
    given = {"iters": 0, "dataset": None, "disable_opt_rtn": True, "group_size": None, "verify": False}
    folder = quantize(demo, tmp_path / "gguf", format="gguf:q8_0", **given).folders[0]
    found = questions.ask(HARNESS, folder, tmp_path / "a.json", "--original", str(demo))
    before = metrics({"tasks": found["tasks_of_original"]})
    assert metrics(found)["ends_local", "perplexity"] == pytest.approx(
        before["ends_local", "perplexity"], rel=0.05
    )


def test_vllm_says_what_transformers_says(questions: Questions, demo: Path, tmp_path: Path) -> None:
    by_vllm = questions.ask(
        VLLM, demo, tmp_path / "a.json", "--eval_backend", "vllm", "--vllm_args", VLLM_ARGS
    )
    by_transformers = questions.ask(HARNESS, demo, tmp_path / "b.json")
    assert metrics(by_vllm) == pytest.approx(metrics(by_transformers), rel=1e-3)
