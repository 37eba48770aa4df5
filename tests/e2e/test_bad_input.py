"""Whatever is wrong with a request: one clear message, an exit code, no traceback, nothing half-made."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.cli.main import main
from auto_round.log import logger
from auto_round.testing.tiny_models import save_tiny_model, tiny_config, tiny_model
from pipeline.runs import SIZES, token_rows, tree

SHORT_WORDS = [
    *["--group_size", "32", "--iters", "2", "--nsamples", "4"],
    *["--seqlen", "16", "--batch_size", "2", "--device", "cpu"],
]
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny_model("llama", folder, dtype=torch.bfloat16, **SIZES)


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model to be spoilt."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in token_rows(20)))
    return path


@pytest.fixture
def command(data, tmp_path, capsys, monkeypatch):
    """Run the command line on a model; its exit code and what it wrote to stderr."""
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)

    def call(*words, dataset=data):
        out = ["--output_dir", str(tmp_path / "out"), "--dataset", str(dataset)]
        capsys.readouterr()
        code = main([*map(str, words[:1]), *SHORT_WORDS, *out, *map(str, words[1:])])
        return code, capsys.readouterr().err

    return call


def assert_refused(result, out, *said):
    code, err = result
    assert code != 0
    assert "Traceback" not in err
    assert err.count("auto-round: error: ") == 1
    message = err.partition("auto-round: error: ")[2]
    assert "unexpected" not in message
    for text in said:
        assert text in message
    assert not list(out.glob("tiny-w*[0-9]"))
    assert not list(out.glob("copy-w*[0-9]"))


def test_the_command_works_when_nothing_is_wrong(command, model, tmp_path):
    code, err = command(model)
    assert code == 0, err
    assert "bits per weight" in err
    assert (tmp_path / "out" / "tiny-w4g32" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scheme", "W4A17"], ['"W4A16"']),
        (["--format", "auto_rond"], ['unknown format "auto_rond"', '"auto_round"']),
        (["--format", "gguf:q4_0_x"], ["gguf:q4_0"]),
        (["--group_sise", "32"], ["--group_sise", "--group_size"]),
        (["--bits", "four"], ["bits"]),
        (["--bits", "5"], ["5 bits", "2, 3, 4 or 8"]),
        (["--group_size", "48"], ["48", "64", "q_proj"]),
        (["--scale_dtype", "fp17"], ["scale_dtype", "fp16"]),
        (["--device", "abacus"], ["abacus"]),
        (["--iters", "-1"], ["iters"]),
        (["--layer_config", "{q_prog:{bits:8}}"], ["q_prog", "q_proj"]),
        (["--ignore_layers", "layers.7"], ["layers.7"]),
        (["--to_quant_block_names", "model.blocks"], ["model.blocks", "model.layers"]),
        (["--lr", "1000"], ["lr", "1000"]),
    ],
    ids=lambda value: "-".join(value)[:32] if isinstance(value, list) else None,
)
def test_words_that_mean_nothing(command, model, tmp_path, words, said):
    assert_refused(command(model, *words), tmp_path / "out", *said)
    assert not (tmp_path / "out").exists()


def no_folder(folder):
    shutil.rmtree(folder)


def no_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)


def damaged_header(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"not JSON")


def missing_tensor(folder):
    spoil(folder, lambda tensors: tensors.pop(GATE))


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    tiny_model(tiny_config("llama", **SIZES), dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="64KB"
    )
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def not_a_number(folder):
    def change(tensors):
        tensors[GATE][3, 4:7] = float("nan")

    spoil(folder, change)


def infinite(folder):
    def change(tensors):
        tensors[GATE][0, 0] = float("inf")

    spoil(folder, change)


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("recipe", ["tuned", "plain"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_folder, ["copy"]),
        (no_config, ["config.json"]),
        (broken_config, ["config.json"]),
        (no_tokenizer, ["tokenizer"]),
        (no_weights, ["safetensors"]),
        (pickled, ["pytorch_model.bin"]),
        (cut_short, ["model.safetensors"]),
        (damaged_header, ["model.safetensors"]),
        (missing_tensor, [GATE]),
        (missing_shard, ["model-00002-of-"]),
        (not_a_number, [GATE, "3 "]),
        (infinite, [GATE, "1 "]),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_models_that_are_not_whole(command, copy, tmp_path, damage, said, recipe):
    if damage is no_tokenizer and recipe == "plain":
        pytest.skip("plain rounding needs no tokenizer")
    damage(copy)
    plain = ["--iters", "0", "--disable_opt_rtn"] if recipe == "plain" else []
    assert_refused(command(copy, *plain), tmp_path / "out", *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, ["rows.jsonl"]),
        ("", ["rows.jsonl"]),
        ("{nonsense\n", ["rows.jsonl", "1"]),
        ('{"input_ids": [5, 6]}\n', ["16", "seqlen"]),
        ((json.dumps({"input_ids": list(range(900, 916))}) + "\n") * 20, ["915", "128"]),
        ('{"colour": 3, "taste": 5}\n', ["colour", "taste"]),
    ],
    ids=["absent", "empty", "no-json", "short", "unknown-token", "no-text"],
)
def test_data_that_cannot_be_used(command, model, tmp_path, text, said):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    assert_refused(command(model, dataset=path), tmp_path / "out", *said)


def test_an_occupied_folder_is_left_alone(command, model, tmp_path):
    mine = tmp_path / "out" / "tiny-w4g32" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    code, err = command(model, "--overwrite")
    assert code != 0
    assert "thesis.txt" in err
    assert "Traceback" not in err
    assert mine.read_text() == "years of work"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny-w4g32"]


def test_a_folder_that_may_not_be_written(command, model, tmp_path, monkeypatch):
    mkdir = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(tmp_path / "out") in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert_refused(command(model), tmp_path / "out", "ermission", str(tmp_path / "out"))


@pytest.mark.parametrize("calls", [1, 12, 40])
def test_a_disk_that_fills_up_leaves_nothing_half_valid_and_the_run_continues(
    command, model, tmp_path, monkeypatch, calls
):
    assert command(model)[0] == 0
    folder = tmp_path / "out" / "tiny-w4g32"
    whole = tree(folder)
    shutil.rmtree(folder)
    pwrite, left = os.pwrite, [calls]

    def fill_up(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill_up)
        assert_refused(command(model), tmp_path / "out", "space", str(tmp_path / "out"))
    assert (tmp_path / "out" / "tiny-w4g32.partial").is_dir()
    code, err = command(model)
    assert code == 0, err
    assert tree(folder) == whole


@pytest.mark.parametrize(("words", "continues"), [([], True), (["--no_resume"], False)])
def test_a_run_that_is_interrupted(command, model, monkeypatch, words, continues):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("auto_round.pipeline.running.lower.tune_group", interrupt)
    code, err = command(model, *words)
    assert code == 130
    assert "auto-round: interrupted" in err
    assert ("the same command continues" in err) is continues
    assert "Traceback" not in err


def test_flags_that_change_nothing_say_so(command, model):
    code, err = command(model, "--model_free", "--mllm", "--dry_run")
    assert code == 0
    assert "model_free has no effect: --recipe rtn rounds plainly" in err
    assert "says whether it reads images" in err, "which this one does not"


def test_the_traceback_is_there_when_asked_for(command, model, monkeypatch):
    monkeypatch.setenv("AR_LOG_LEVEL", "DEBUG")
    code, err = command(model, "--scheme", "W4A17")
    assert code != 0
    assert "Traceback" in err
