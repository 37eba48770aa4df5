"""Folders counted by hand; wrong input gives one clear error; the command prints what there is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from auto_round.cli import main as cli
from auto_round.consumers.inventory import take_inventory
from auto_round.errors import CheckpointError, ConfigError
from consumers.folders import AUTO_ROUND, Case, names, write

KEEP = {"bits": 16, "data_type": "float"}


@pytest.fixture
def mixed(tmp_path):
    extra = dict.fromkeys(names("mlp.down_proj"), KEEP) | {n: {"bits": 8} for n in names("self_attn.o_proj")}
    others = {"mlp.down_proj": None, "self_attn.o_proj": (8, 128)}
    return write(tmp_path / "m", Case(config={**AUTO_ROUND, "extra_config": extra}, others=others))


def test_counts(mixed):
    found = take_inventory(mixed)
    small = 2 * (256 * 256 + 2 * 128 * 256 + 2 * 512 * 256)
    assert found.schemes == {"W4 g128 sym": (10, small), "W8 g128 sym": (2, 2 * 256 * 256)}
    assert found.kept == {"16 bits": ("model.embed_tokens", *names("mlp.down_proj"), "lm_head")} or set(
        found.kept["16 bits"]
    ) == {"model.embed_tokens", *names("mlp.down_proj"), "lm_head"}
    # 4 bits, a float16 step and 4 bits of zero point for 128 weights; 8 bits alike
    stored = small * (4 + 20 / 128) + 2 * 256 * 256 * (8 + 24 / 128)
    assert found.bits_per_weight == pytest.approx(stored / (small + 2 * 256 * 256))
    assert found.format == "auto-round (auto_round:auto_gptq)"


def test_command(mixed, capsys):
    assert cli.main(["inspect", str(mixed)]) == 0
    out = capsys.readouterr().out
    for text in (
        "auto-round (auto_round:auto_gptq)",
        "W4 g128 sym",
        "vLLM",
        "SGLang",
        "layers.{0-1}.mlp.down_proj",
    ):
        assert text in out
    assert cli.main(["inspect", "--json", str(mixed)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engines"]["vLLM"]["loads"] is True
    assert found["schemes"]["W8 g128 sym"]["matrices"] == 2
    assert cli.main(["inspect", "--help"]) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["inspect", "nowhere"], ["inspect", "--what", "nowhere"], ["convert", "nowhere"]]
)
def test_wrong_words(words, capsys):
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        take_inventory(tmp_path / "no")
    with pytest.raises(ConfigError, match=r"config\.json"):
        take_inventory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not quantized"):
        take_inventory(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": 4}')
    with pytest.raises(CheckpointError, match="quant_method"):
        take_inventory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        take_inventory(tmp_path)


def test_nothing_is_packed(tmp_path):
    folder = write(tmp_path / "m", Case(config=AUTO_ROUND, stored=None))
    with pytest.raises(CheckpointError, match="no tensor in it is packed"):
        take_inventory(folder)


def test_damaged_header(mixed):
    path = mixed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        take_inventory(mixed)


@pytest.mark.parametrize(
    "change",
    [
        {"qzeros": None},
        {"scales": None},
        {"scales": (3, 256)},
        {"qzeros": (2, 31)},
        {"qweight": (33, 255)},
        {"qweight": (4,)},
        {"scales": (2, 0)},
    ],
)
def test_tensors_that_contradict_each_other(tmp_path, change):
    shapes = {"qweight": (32, 256), "qzeros": (2, 32), "scales": (2, 256)} | change
    tensors = {f"model.layers.0.up.{k}": torch.zeros(s, dtype=torch.int32) for k, s in shapes.items() if s}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AUTO_ROUND}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.up"):
        take_inventory(tmp_path)
