"""The command of a run asks for the same run again."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from auto_round.cli.arguments import parse
from auto_round.config import all_settings, build_options
from auto_round.config.options import GROUPS
from auto_round.config.values import FROM_PYTHON
from auto_round.pipeline.writing.command import command_of
from pipeline.test_every_option import ACTS

HANDLING = {"output_dir", "overwrite", "resume", "dry_run", "report"}


def same(one, other) -> bool:
    return all(
        getattr(getattr(one, key), name) == getattr(getattr(other, key), name)
        for key, group in GROUPS.items()
        for name in group.__dataclass_fields__
        if name not in HANDLING
    )


def again(command: str):
    """Options that the command line means."""
    words = shlex.split(command)
    assert words[0] == "auto-round"
    found = parse(words[1:])
    return build_options(found.given, found.recipe)


@pytest.mark.parametrize("name", [name for name in ACTS if name != "lr_scheduler"])
def test_every_option_comes_back(name):
    # Rows of tokens are given from Python only.
    given = {key: value for key, value in ACTS[name].beside.items() if key != "dataset"}
    options = build_options({"model": "a folder/it's", **given, name: ACTS[name].value})
    command, beside = command_of(options)
    assert same(again(command), options)
    assert beside == []


@pytest.mark.parametrize("recipe", ["default", "best", "light", "distill", "rtn", "opt_rtn"])
def test_recipes_are_written_out(recipe):
    options = build_options({"model": "m"}, recipe)
    assert same(again(command_of(options)[0]), options)


@pytest.mark.parametrize(
    "given",
    [
        {"sym": False, "verify": False, "disable_opt_rtn": False, "enable_torch_compile": False},
        {
            "layer_config": {"k_proj": {"bits": 8, "group_size": 32}, "x": "W8A16"},
            "ignore_layers": ("a", "b"),
        },
        {"dataset": "a.jsonl,b:num=3", "max_shard_size": "3MB", "device_map": "cuda:1"},
    ],
    ids=str,
)
def test_other_values_come_back(given):
    options = build_options({"model": "m", **given})
    assert same(again(command_of(options)[0]), options)


def test_what_only_python_can_say_stands_beside_it():
    given = {"lr_scheduler": len, "dataset": f"list {FROM_PYTHON}", "scheme": {"bits": 3}}
    command, beside = command_of(build_options({"model": "m", **given}))
    assert command == "auto-round m"
    wanted = [
        "dataset: list given from Python",
        "lr_scheduler: <built-in function len>",
        "scheme: {'bits': 3}",
    ]
    assert sorted(beside) == wanted


def test_what_autoscheme_chose_is_taken_from_its_file():
    asked = {
        "model": "m",
        "avg_bits": 3,
        "scheme_options": "W2A16,W4A16",
        "layer_config": {"k_proj": "W8A16"},
    }
    chosen = replace(build_options({**asked, "iters": 7}), chosen={"layer_config": {}})
    assert command_of(chosen)[0] == "auto-round m --layer_config auto_scheme.json --iters 7"


def test_a_plain_run_is_a_plain_command():
    assert command_of(build_options({"model": "m", "output_dir": "x", "report": True})) == (
        "auto-round m",
        [],
    )
    assert {s.name for s in all_settings()} >= HANDLING
