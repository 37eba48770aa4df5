"""Environment variables are read in one place and refused when they mean nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import auto_round
from auto_round.config import (
    VARIABLES,
    Environment,
    cache_folder,
    environment_markdown,
    read_environment,
    unknown_variables,
)
from auto_round.config.env import SPINS, wait_shortly
from auto_round.errors import ConfigError


def test_defaults():
    assert read_environment({}) == Environment()


def test_values():
    got = read_environment(
        {
            "AR_LOG_LEVEL": "debug",
            "AR_USE_MODELSCOPE": "True",
            "AR_WORK_SPACE": "/Big/Disk",
            "AR_OMP_NUM_THREADS": "3",
        }
    )
    assert got == Environment("DEBUG", True, Path("/Big/Disk"), 3)


@pytest.mark.parametrize(
    "table", [{"AR_LOG_LEVEL": "LOUD"}, {"AR_USE_MODELSCOPE": "maybe"}, {"AR_OMP_NUM_THREADS": "-1"}]
)
def test_errors_name_the_variable(table):
    with pytest.raises(ConfigError, match=next(iter(table))):
        read_environment(table)


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({}, Path.home() / ".cache" / "auto_round"),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "auto_round"),
        ({"XDG_CACHE_HOME": "/caches"}, Path("/caches/auto_round")),
        ({"XDG_CACHE_HOME": "/caches", "AR_CACHE": "/own"}, Path("/own")),
        ({"AR_CACHE": "~/own"}, Path.home() / "own"),
    ],
)
def test_one_folder_of_caches(table, wanted):
    assert cache_folder(table) == wanted


def test_unknown_variables():
    assert unknown_variables({"AR_RESUME_DIR": "x", "AR_LOG_LEVEL": "INFO", "PATH": ""}) == ("AR_RESUME_DIR",)


def test_table():
    for variable in VARIABLES:
        assert f"| `{variable.name}` |" in environment_markdown()


def test_one_reader():
    root = Path(auto_round.__file__).parent
    readers = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        if re.search(r"os\.(environ|getenv)", p.read_text())
    }
    assert readers <= {"config/env.py"}


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_shortly_unless_the_user_has_said_how(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test is over
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wait_shortly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_commands_say_how_threads_wait_before_pytorch_is_loaded():
    code = "import sys, os; from auto_round.cli.main import main; main(['--version']); print("
    code += "os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert said.split()[-2:] == [SPINS, "False"]
