"""What the commands print as one of several processes, and how they end when their launcher stops them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from auto_round.cli import exit_codes
from auto_round.cli.main import _log_on_stderr, main
from auto_round.log import logger
from auto_round.ranks.place import Place

TOGETHER = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank):
        for name, value in {**TOGETHER, "RANK": rank}.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_name_the_rank(as_rank, capsys, rank):
    as_rank(rank)
    assert main(["--model", "no/such/folder/at/all", "--bits", "99"]) == exit_codes.REQUEST
    assert capsys.readouterr().err.startswith(f"auto-round: [rank {rank}] error: ")


def test_a_contradiction_in_the_environment_is_an_error_like_others(as_rank, capsys):
    as_rank("7")
    assert main(["--model", "m"]) == exit_codes.REQUEST
    assert "RANK is 7 and WORLD_SIZE is 2" in capsys.readouterr().err


def test_an_unknown_backend_is_refused_before_anything_is_read(capsys):
    assert main(["--model", "no/such/folder/at/all", "--dist_backend", "glo"]) == exit_codes.REQUEST
    said = capsys.readouterr().err
    assert '"glo"' in said
    assert "gloo" in said


def test_only_the_first_rank_says_more_than_errors(capsys):
    for place in (Place(0, 2, 0), Place(1, 2, 1), None):
        with _log_on_stderr("INFO", place):
            logger.info("a note")
            logger.error("an error")
    assert capsys.readouterr().err.splitlines() == [
        "[rank 0] INFO: a note",
        "[rank 0] ERROR: an error",
        "[rank 1] ERROR: an error",
        "INFO: a note",
        "ERROR: an error",
    ]


STOPPED = """
import os, signal, threading, time
from auto_round.cli.launched import ended_by_launcher
from auto_round.ranks.place import Place

before = signal.getsignal(signal.SIGTERM)
with ended_by_launcher(None):
    assert signal.getsignal(signal.SIGTERM) == before
with ended_by_launcher(Place(1, 2, 1)):
    pass
assert signal.getsignal(signal.SIGTERM) == before
with ended_by_launcher(Place(1, 2, 1)):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while True:  # no exception gets past this
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


def test_a_rank_that_its_launcher_stops_ends_with_an_error_that_says_so():
    ended = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=50)
    assert ended.returncode == exit_codes.FAILED
    assert ended.stderr.startswith("auto-round: [rank 1] error: stopped by the program that started it")
    assert "the same command continues" in ended.stderr
