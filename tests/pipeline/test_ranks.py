"""One run by several processes: the folder of one process, errors before work, and what a death leaves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from auto_round.testing.tiny_models import save_tiny_model
from export.gguf.small_models import byte_level_tokenizer
from pipeline.runs import ROWS, SHORT, SIZES, tree

DRIVER = Path(__file__).with_name("ranks_driver.py")
EXACT = {**SHORT, "batch_size": 4, "nsamples": 6, "enable_deterministic_algorithms": True}


def drive(folder, cases):
    """How the cases ended."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, DRIVER, path], env=env, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def case(model, out, ranks, *, rows=ROWS, verify=False, **more):
    apart = {name: more.pop(name) for name in ("of_rank", "kill") if name in more}
    options = {**EXACT, "model": str(model), "output_dir": str(out), "verify": verify, **more}
    return {"ranks": ranks, "options": options, "rows": rows, **apart}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), **SIZES, head_dim=16)


def test_two_processes_write_what_one_writes_and_differences_are_refused_before_work(model, tmp_path):
    cases = [
        case(model, tmp_path / "one", 1),
        case(model, tmp_path / "two", 2),
        case(model, tmp_path / "other", 2, of_rank={"1": {"iters": 3}}),
        case(model, tmp_path / "many", 3, nsamples=2),
        case(model, tmp_path / "again", 2, output_dir=str(tmp_path / "one")),
    ]
    one, two, other, many, again = drive(tmp_path, cases)
    assert one["ends"] == [0]
    assert two["ends"] == again["ends"] == [0, 0]
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert other["ends"] == [1, 1]
    assert all(
        "rank 1 has other options than rank 0" in said and 'iters: "2"' in said for said in other["said"]
    )
    assert many["ends"] == [1, 1, 1]
    assert all("3 processes cannot divide 2 calibration rows" in said for said in many["said"])
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "many.partial").exists()


WORK = {
    "tuned": {},
    "the last block by predictions, norms": {
        "enable_alg_ext": True,
        "enable_norm_bias_tuning": True,
        "iters": 4,
    },
    "searched": {"iters": 0, "quant_lm_head": True},
    "plain, two formats": {"iters": 0, "disable_opt_rtn": True, "rows": None, "format": "auto_round,fake"},
    "inputs of a fixed scale": {"scheme": "FP8_STATIC", "group_size": None, "format": "fake"},
    "smoothed inputs": {"scheme": "INT8", "group_size": None, "format": "fake"},
    "GGUF": {"scheme": "gguf:q4_k_m", "group_size": None, "format": "gguf:q4_k_m"},
}


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_any_number_of_processes_writes_what_one_writes(tmp_path, work):
    gguf = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 288}
    model = save_tiny_model("qwen3", tmp_path / "model", head_dim=16, **(gguf if work == "GGUF" else SIZES))
    if work == "GGUF":
        byte_level_tokenizer().save_pretrained(model)
    given = {"verify": work == "tuned", **WORK[work]}
    ended = drive(tmp_path, [case(model, tmp_path / f"out{n}", n, **given) for n in (1, 2, 3)])
    assert [each["ends"] for each in ended] == [[0], [0, 0], [0, 0, 0]], [each["said"] for each in ended]
    assert tree(tmp_path / "out2") == tree(tmp_path / "out1") == tree(tmp_path / "out3")


@pytest.mark.slow
def test_without_the_fixed_order_processes_still_agree(model, tmp_path):
    given = {"enable_deterministic_algorithms": False, "iters": 8}
    one, three = drive(
        tmp_path, [case(model, tmp_path / "one", 1, **given), case(model, tmp_path / "three", 3, **given)]
    )
    assert (one["ends"], three["ends"]) == ([0], [0, 0, 0])
    kl = [json.loads((tmp_path / n / "report.json").read_text())["held_out"]["kl"] for n in ("one", "three")]
    assert kl[1] == pytest.approx(kl[0], rel=0.05)


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_continues_on_any_number(model, tmp_path):
    chance = random.Random(0)
    whole, three = drive(
        tmp_path, [case(model, tmp_path / "one", 1, iters=12), case(model, tmp_path / "x", 3, iters=12)]
    )
    seconds, cases, sizes = three["seconds"], [], [2, 3]
    for number in range(10):
        out, size = tmp_path / f"out{number}", sizes[number % 2]
        kill = [chance.randrange(size), chance.uniform(0.1, 0.95) * seconds]
        cases += [
            case(model, out, size, iters=12, kill=kill),
            case(model, out, chance.choice([1, 2, 3]), iters=12),
        ]
    ended = drive(tmp_path, cases)
    assert whole["ends"] == [0]
    killed = 0
    for number, (died, continued) in enumerate(zip(ended[::2], ended[1::2], strict=True)):
        assert "hung" not in died["ends"], died
        assert continued["ends"] == [0] * len(continued["ends"]), continued
        assert tree(tmp_path / f"out{number}") == tree(tmp_path / "one")
        if -9 in died["ends"]:
            killed += 1
            others = [said for end, said in zip(died["ends"], died["said"], strict=True) if end == 1]
            assert all("another process of this run has ended" in said for said in others), died
    assert killed >= 5
