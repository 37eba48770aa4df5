"""`auto-round eval`: words, what is printed, and the exit code."""

from __future__ import annotations

import json

import pytest

from auto_round.cli import exit_codes
from auto_round.cli import main as cli
from auto_round.cli.evaluate_words import eval_parser as parser
from auto_round.cli.evaluate_words import read_words
from auto_round.errors import ConfigError
from export.gguf.small_models import save_small_model


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command that compares two models of random weights."""
    root = tmp_path_factory.mktemp("eval")
    model = save_small_model("llama", root / "model")
    other = save_small_model("llama", root / "other", rms_norm_eps=0.1)
    (root / "text.txt").write_text("the hat can be here. " * 30)
    line = f"eval {other} --original {model} --text {root / 'text.txt'} --seqlen 16 --tokens 128 --device cpu"
    return [*line.split(), "--noise-floor", "none", "--cache-dir", str(root / "cache")]


def test_table_json_and_file(words, capsys, tmp_path):
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("model ")
    assert "nats per token" in text
    assert "same top" in text
    assert cli.main([*words, "--json", "--output", str(tmp_path / "a.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a.json").read_text())
    assert printed["kl"]["mean"]["value"] > 0


@pytest.mark.parametrize(
    ("place", "said"),
    [(".", "is a folder"), ("missing/a.json", "there is no folder"), ("text.txt/a", "no folder")],
)
def test_a_file_that_cannot_be_written_is_said_before_work(words, capsys, tmp_path, monkeypatch, place, said):
    """It was said behind it, and the figures were lost."""
    monkeypatch.setattr("auto_round.evaluate.evaluation.plan_evaluation", lambda *_: pytest.fail("planned"))
    (tmp_path / "text.txt").touch()
    assert cli.main([*words, "--output", str(tmp_path / place)]) == exit_codes.REQUEST
    assert said in capsys.readouterr().err


def test_the_gate_speaks_by_the_exit_code(words, capsys):
    assert cli.main([*words, "--max_kl", "100"]) == 0
    assert "within 100" in capsys.readouterr().out
    assert cli.main([*words, "--max-kl", "1e-9", "--json"]) == exit_codes.TOO_FAR == 3
    assert json.loads(capsys.readouterr().out)["gate"] == {"max_kl": 1e-9, "passed": False}


def test_the_program_of_its_own(words, capsys):
    assert cli.main_eval([*words[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == 8 * 15


def test_help(capsys):
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--original" in text
    assert "--max_kl" in text
    assert "make small" not in text
    assert "to tune" not in text
    assert "[10GB]" in text
    assert cli.main(["help", "eval"]) == 0


def test_spellings():
    found = read_words(parser(), ["m", "--bs=4", "--seq-len", "9", "--text", "t", "--cache_size", "0"])
    assert found.evaluation.eval_bs == "4"
    assert found.fidelity.seqlen == 9
    assert found.fidelity.cache_size == 0
    assert read_words(parser(), ["--model", "m", "--batch_size", "auto:4"]).evaluation.eval_bs == "auto:4"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("m --iters 3", "belongs to quantizing"),
        ("m --orginal x", 'did you mean "--original"'),
        ("m n", "one model at a time"),
        ("--text t", "no model given"),
        ("m --bs 0", "above zero"),
        ("m --max_kl -1", "at least 0"),
        ("m --limit 0", "number of questions"),
        ("m --limit 2.5", "number of questions"),
        ("m --gguf_engine cuda", "torch, llama_cpp"),
    ],
)
def test_wrong_words(line, said):
    with pytest.raises(ConfigError, match=said):
        read_words(parser(), line.split())
