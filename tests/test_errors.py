"""Errors are also the built-in ones that people catch around calls of this kind."""

from __future__ import annotations

import pytest
import torch

import auto_round
from auto_round.checkpoint.disk import reading, writing
from auto_round.checkpoint.reader import Checkpoint
from auto_round.config import build_options
from auto_round.errors import (
    AutoRoundError,
    CheckpointError,
    ConfigError,
    MissingError,
    NumericsError,
    UnsupportedError,
)
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.testing.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny_model("llama", folder, dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(
    ("given", "builtin"),
    [
        ({"layer_config": {"no_such_proj": {"bits": 8}}}, ValueError),
        ({"layer_config": {"q_proj": {"bits": 17}}}, ValueError),
        ({"ignore_layers": "no_such_proj"}, ValueError),
        ({"to_quant_block_names": "no.such.blocks"}, ValueError),
        ({"scheme": "W4A17"}, ValueError),
        ({"group_size": 48}, ValueError),
        ({"device_map": "abacus"}, ValueError),
        ({"dataset": "no-such-file.jsonl"}, FileNotFoundError),
        ({"bits": 5, "data_type": "mx_fp"}, NotImplementedError),
        ({"bits": 5, "data_type": "mx_fp"}, ValueError),
        ({"bits": 5}, NotImplementedError),
    ],
)
def test_requests(model, given, builtin):
    options = build_options({"model": str(model), "group_size": 32, "iters": 1, **given})
    with pytest.raises(builtin) as caught:
        prepare(options)
    assert isinstance(caught.value, AutoRoundError)


@pytest.mark.parametrize(
    ("given", "builtin"),
    [
        ({"iters": -1}, ValueError),
        ({"layer_config": "no-such-rules.json"}, FileNotFoundError),
        ({"no_such_argument": 1}, TypeError),
        ({"bs": 1, "batch_size": 2}, TypeError),
        ({"avg_bits": 3}, ValueError),
        ({"algorithm": "awq"}, NotImplementedError),
    ],
)
def test_arguments(model, given, builtin):
    with pytest.raises(builtin) as caught:
        auto_round.AutoRound(str(model), **given)
    assert isinstance(caught.value, (ConfigError, UnsupportedError))


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "/no-such-folder"])
def test_models_that_are_not_there(name):
    with pytest.raises(FileNotFoundError, match="folder"):
        prepare(build_options({"model": name}))


def test_damaged_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        Checkpoint.open(tmp_path)
    assert isinstance(caught.value, CheckpointError)


def test_numbers():
    assert issubclass(NumericsError, ArithmeticError)


@pytest.mark.parametrize("around", [reading, writing])
@pytest.mark.parametrize("error", [MissingError("this one"), CheckpointError("that one")])
def test_ours_pass_where_errors_of_files_get_a_remedy(tmp_path, around, error):
    with pytest.raises(type(error)) as caught, around(tmp_path):
        raise error
    assert caught.value is error
