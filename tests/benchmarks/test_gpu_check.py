"""The one command for a GPU: what fails costs no other part, and all of it is rehearsed on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setitem(sys.modules, "gpu_check", module)  # its dataclasses look themselves up there
        spec.loader.exec_module(module)
        yield module


def lines_of(gpu_check, program, seconds=60.0):
    written = []
    good = gpu_check.run_process(
        "part", [sys.executable, "-c", program], seconds, written.append, dict(os.environ)
    )
    return good, written


def test_a_part_that_raises_leaves_its_traceback_and_what_it_knew(gpu_check):
    good, written = lines_of(gpu_check, 'print(\'{"what": "known"}\', flush=True)\n1 / 0')
    assert not good
    assert written[0] == {"part": "part", "what": "known"}
    assert written[1]["what"] == "failed"
    assert written[1]["why"] == "exit code 1"
    assert "ZeroDivisionError" in written[1]["traceback"]


def test_a_part_that_crashes_or_hangs_is_ended(gpu_check):
    good, written = lines_of(gpu_check, "import os; os.abort()")
    assert not good
    assert written[-1]["why"] == "signal SIGABRT"
    hang = (
        "import subprocess, sys\nprint('{}\\n{', end='', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    )
    good, written = lines_of(gpu_check, hang, seconds=1.0)
    assert not good
    assert written[:2] == [{"part": "part"}, {"part": "part", "what": "cut off", "text": "{"}]
    assert written[-1]["why"].startswith("not done after")


def test_boxes_follow_one_another_and_end_before_nine_minutes(gpu_check):
    ends = [part.until for part in gpu_check.PARTS]
    assert ends == sorted(ends)
    assert ends[-1] < 9 * 60
    assert [part.name for part in gpu_check.PARTS][:4] == ["machine", "tests", "model", "block"]


def test_tests_of_a_gpu_are_skipped_without_one():
    """The mark `gpu` alone skips nothing: files take it from `accelerator`, together with its conditions."""
    tests = ROOT / "tests"
    for path in sorted(set(tests.rglob("*.py")) - {tests / "accelerator.py", Path(__file__).resolve()}):
        text = path.read_text(encoding="utf-8")
        assert "mark.gpu" not in text, path
        if path.name.startswith("test_gpu_") or "from accelerator import" in text:
            assert "pytestmark = NEEDED" in text, path


@pytest.mark.slow
def test_everything_is_rehearsed_on_a_cpu(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "lines.jsonl"
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--small", "--out", str(out)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert found.returncode == 0, [row for row in rows if row.get("what") == "failed"]
    assert out.read_text() == found.stdout
    tests = [row for row in rows if row["what"] == "test" and row["outcome"] == "passed"]
    assert {row["test"].partition("::")[0].rpartition("/")[2] for row in tests} == {
        "test_gpu_kernels.py",
        "test_gpu_tuning.py",
        "test_gpu_runs.py",
    }
    runs = [row["model"] for row in rows if row["what"] == "run"]
    assert runs == ["Qwen3-0.6B", "block of 8B", *["4 blocks of Qwen3-0.6B"] * 2]
    timed = {(row["kernel"], row["tokens"]) for row in rows if row["what"] == "linear" and "us" in row}
    assert timed == {(kernel, tokens) for kernel in ("triton", "torch") for tokens in (1, 3)}
    assert rows[-1]["failed"] == []
