"""Exit codes and messages: one clear line, no traceback unless asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from auto_round.calibration.registry import find_dataset, known_names
from auto_round.cli import main as cli
from auto_round.diffusion.captions import COCO
from auto_round.errors import CheckpointError, ConfigError, InternalError, NumericsError, UnsupportedError
from auto_round.kernels.table import STAND_INS


@pytest.fixture
def fail_with(monkeypatch):
    def set_failure(error):
        def fail(argv, recipe):
            raise error

        monkeypatch.setattr(cli, "_dispatch", fail)

    return set_failure


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("wrong word"), 2, "error: wrong word"),
        (UnsupportedError("not there yet"), 2, "error: not there yet"),
        (CheckpointError("file a.safetensors"), 1, "error: file a.safetensors"),
        (NumericsError("3 NaN"), 1, "error: 3 NaN"),
        (InternalError("promise"), 1, "AR_LOG_LEVEL=DEBUG"),
        (ValueError("surprise"), 1, "unexpected ValueError: surprise"),
        (MemoryError(), 1, "out of memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
            ),
            1,
            "out of memory: try a smaller",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "out of memory: try a smaller"),
        (KeyboardInterrupt(), 130, "auto-round: interrupted"),
    ],
)
def test_failures(fail_with, capsys, monkeypatch, error, code, text):
    monkeypatch.setenv("AR_LOG_LEVEL", "INFO")
    fail_with(error)
    assert cli.main(["m"]) == code
    out, err = capsys.readouterr()
    assert text in err
    assert "Traceback" not in err
    assert out == ""


def test_traceback_when_debugging(fail_with, capsys, monkeypatch):
    monkeypatch.setenv("AR_LOG_LEVEL", "DEBUG")
    fail_with(ConfigError("wrong word"))
    assert cli.main(["m"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: wrong word" in err


def test_a_bad_variable_is_an_error_like_any_other(capsys, monkeypatch):
    monkeypatch.setenv("AR_LOG_LEVEL", "LOUD")
    assert cli.main(["--help"]) == 2
    assert "AR_LOG_LEVEL" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["help"], []])
def test_help(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "--group_size" in out
    assert "not there yet" in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("auto-round 1.")


@pytest.mark.parametrize(
    ("command", "recipe"),
    [
        (cli.main, "default"),
        (cli.main_best, "best"),
        (cli.main_light, "light"),
        (cli.main_rtn, "rtn"),
        (cli.main_opt_rtn, "opt_rtn"),
    ],
)
def test_each_command_has_its_recipe(command, recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_dispatch", lambda argv, recipe: seen.append((argv, recipe)) or 0)
    assert command(["m"]) == 0
    assert seen == [(["m"], recipe)]


@pytest.mark.parametrize("topic", ["format", "scheme", "dataset"])
def test_lists(topic, capsys):
    assert cli.main(["list", topic]) == 0
    out = capsys.readouterr().out
    wanted = {"format": "auto_round", "scheme": "W4A16", "dataset": "python-docs"}
    assert wanted[topic] in out


def test_every_data_set_scheme_and_kernel_that_has_a_name_is_listed(capsys):
    listed = {}
    for topic in ("dataset", "scheme", "backend"):
        assert cli.main(["list", topic]) == 0
        listed[topic] = capsys.readouterr().out
    for name in (*known_names(), COCO):
        row = find_dataset(name)
        assert (row.names[0] if row else name) in listed["dataset"]
    assert COCO not in listed["dataset"].partition("(not there yet)")[2]
    for word in ("g128: in groups", "sym: no zero points", "bits 8 for linear, shared expert, head"):
        assert word in listed["scheme"]
    understood = " ".join(listed["backend"].split())
    assert all(name in understood for name in STAND_INS)
    assert len(listed["backend"].splitlines()) < 60


def test_unknown_list(capsys):
    assert cli.main(["list", "formts"]) == 2
    assert '"format"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["no-such/model-anywhere", "--scheme", "W5B16"],
        ["m", "--scheme", "W4A17"],
        ["m", "--bits", "17"],
    ],
)
def test_unknown_scheme_is_refused_before_work(words, capsys):
    assert cli.main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


LAST_WORDS = """
import sys
from auto_round.cli.main import main
assert main(["--version"]) == 0
import triton
"""


def test_the_end_is_silent_with_triton_installed():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", LAST_WORDS], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout.startswith("auto-round")


@pytest.mark.parametrize(("module", "frozen"), [("nanobind", False), ("elsewhere", True)])
def test_memory_is_left_to_the_system_unless_somebody_counts_it(monkeypatch, module, frozen):
    seen = []
    monkeypatch.setattr(cli.gc, "freeze", lambda: seen.append(True))
    kept = type("Meta", (type,), {"__module__": module})
    monkeypatch.setattr(cli, "type", _OnlySubclass(kept), raising=False)
    cli._spare_the_last_collection()
    assert bool(seen) is frozen


class _OnlySubclass:
    """`type` with one metaclass, whatever else this process has loaded."""

    def __init__(self, kept):
        self._kept = kept

    def __subclasses__(self, of):
        return [self._kept]
