"""Environment variables are read in one place and refused when they mean nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import auto_round
from auto_round.config import (
    VARIABLES,
    Environment,
    environment_markdown,
    read_environment,
    unknown_variables,
)
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
