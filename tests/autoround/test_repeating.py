"""The same snippet twice, two snippets into one folder, and formats that need runs of their own."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.cli.main import main_rtn
from auto_round.errors import ConfigError, UnsupportedError
from export.gguf.small_models import save_small_model

PLAIN = {"group_size": 32, "iters": 0, "disable_opt_rtn": True}
"""No data, no tuning: what is tried here is what happens to folders."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_model("qwen3", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def words(caplog, monkeypatch):
    monkeypatch.setattr("auto_round.log.logger.propagate", True)
    return caplog


def stamp(folder):
    return {f.relative_to(folder).as_posix(): f.stat().st_ino for f in folder.rglob("*") if f.is_file()}


def config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_same_snippet_twice_says_that_it_is_done(folder, tmp_path, words):
    out = tmp_path / "tmp_autoround"
    first, (path,) = AutoRound(folder, **PLAIN).quantize_and_save(out)
    before = stamp(out)
    second, (again,) = AutoRound(folder, **PLAIN).quantize_and_save(out)
    assert again == path
    assert stamp(out) == before
    assert "finished already, with the same settings" in words.text
    ids = torch.arange(8)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    AutoRound(folder, **PLAIN).quantize_and_save(out, overwrite=True, load=False)
    assert stamp(out) != before
    assert [f.name for f in tmp_path.iterdir()] == ["tmp_autoround"]


def test_another_snippet_replaces_our_folder_and_nothing_of_its_owner(folder, tmp_path):
    out = tmp_path / "tmp_autoround"
    AutoRound(folder, **PLAIN).quantize_and_save(out, format="auto_gptq,auto_round", load=False)
    (out / "thesis.txt").write_text("years of work")
    AutoRound(folder, bits=8, **PLAIN).quantize_and_save(out, format="auto_round", load=False)
    assert config(out)["bits"] == 8
    assert (out / "thesis.txt").read_text() == "years of work"
    assert not (out / "auto_gptq").exists()
    rounder = AutoRound(folder, bits=2, **PLAIN)
    rounder.quantize()
    for _ in range(2):
        rounder.save_quantized(out)
    assert config(out)["bits"] == 2
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_snippet_after_a_command_into_the_same_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(folder), "--group_size", "32", "--output_dir", "tmp_autoround"]
    assert [main_rtn(command), main_rtn(command)] == [0, 0]
    assert "finished already" in capsys.readouterr().err
    AutoRound(folder, bits=8, **PLAIN).quantize_and_save("tmp_autoround", load=False)
    assert config(tmp_path / "tmp_autoround")["bits"] == 8
    assert config(tmp_path / "tmp_autoround" / "tiny-w4g32")["bits"] == 4
    assert main_rtn(command) == 0


def test_a_folder_that_is_not_ours_names_what_helps_in_python(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r'already holds 1 files \("thesis.txt".*choose another'):
            AutoRound(folder, **PLAIN).quantize_and_save(tmp_path / "mine", overwrite=overwrite)
    older = tmp_path / "older"
    AutoRound(folder, **PLAIN).quantize_and_save(older, load=False)
    (older / ".auto_round.json").unlink()
    with pytest.raises(ConfigError, match="in Python overwrite=True"):
        AutoRound(folder, **PLAIN).quantize_and_save(older)
    AutoRound(folder, overwrite=True, **PLAIN).quantize_and_save(older, load=False)


def test_several_gguf_types_and_packed_formats_in_one_call(folder, tmp_path):
    ar = AutoRound(folder, scheme="W4A16", **PLAIN)
    formats = "gguf:q8_0,auto_round,gguf:q4_0,auto_gptq"
    _, folders = ar.quantize_and_save(tmp_path / "many", format=formats, load=False)
    names = [f.relative_to(tmp_path / "many").as_posix() for f in folders]
    assert names == ["auto_round", "auto_gptq", "gguf-q8_0", "gguf-q4_0"]
    assert [len(list(f.glob("*.gguf"))) for f in folders] == [0, 0, 1, 1]
    before = stamp(tmp_path / "many")
    ar.quantize_and_save(tmp_path / "many", format=formats, load=False)
    assert stamp(tmp_path / "many") == before
    command = [str(folder), "--format", "gguf:q4_0,gguf:q5_0", "--output_dir", str(tmp_path / "command")]
    assert main_rtn(command) == 0
    assert len(list((tmp_path / "command").glob("*/gguf-q*_0/*.gguf"))) == 2
    with pytest.raises(UnsupportedError):
        ar.quantize_and_save(tmp_path / "no", format="auto_round,gguf:q4_0,mlx")
    assert not (tmp_path / "no").exists()


def test_a_gguf_file_is_saved_after_quantize(folder, tmp_path):
    ar = AutoRound(folder, scheme="GGUF:Q4_0", iters=0, disable_opt_rtn=True)
    model, schemes = ar.quantize()
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert {s["bits"] for s in schemes.values()} == {4, 8}, "llama.cpp gives the head 8 bits"
    (first,) = ar.save_quantized(tmp_path / "first", format="gguf:q4_0")
    (second,) = ar.save_quantized(tmp_path / "second")
    (fake,) = ar.save_quantized(tmp_path / "fake", format="fake")
    (one,), (two,) = first.glob("*.gguf"), second.glob("*.gguf")
    assert one.read_bytes() == two.read_bytes()
    again = AutoModelForCausalLM.from_pretrained(fake, dtype="auto")
    assert torch.equal(again(torch.arange(8)[None]).logits, model(torch.arange(8)[None]).logits)
    for other in ("gguf:q8_0", "auto_round"):
        with pytest.raises(ConfigError, match="made a GGUF file of type q4_0; call quantize_and_save"):
            ar.save_quantized(tmp_path / "other", format=other)


@pytest.mark.parametrize("packed", ["gguf:q4_0", "auto_gptq"])
def test_rounded_weights_named_first_leave_the_plan_to_the_other_format(folder, tmp_path, words, packed):
    ar = AutoRound(folder, format=f"fake,{packed}", bits=4, group_size=16, iters=0, disable_opt_rtn=True)
    ar.quantize()
    assert words.text.count("group_size: no effect") == packed.startswith("gguf")
    fake, other = ar.save_quantized(tmp_path / "out")
    _, at_once = ar.quantize_and_save(tmp_path / "at once", load=False)
    for one, two in zip((fake, other), at_once, strict=True):
        (weights,) = (f for f in one.iterdir() if f.suffix in (".safetensors", ".gguf"))
        assert weights.read_bytes() == (two / weights.name).read_bytes()


def test_one_row_tunes_and_judges(folder, tmp_path, words):
    text = ["low bits, low bits " * 240]
    settings = {"group_size": 32, "iters": 2, "seqlen": 32, "dataset": text}
    _, (out,) = AutoRound(folder, **settings).quantize_and_save(tmp_path / "out")
    assert "one row tunes, and judges" in words.text
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["rows_tuned"] == 1
    assert report["calibration"]["rows_held_out"] == 0
    assert report["held_out"]["tuned_on_too"]
    assert "tuned tokens" in (out / "README.md").read_text()
