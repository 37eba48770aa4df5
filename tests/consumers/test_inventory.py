"""Folders counted by hand; wrong input gives one clear error; the command prints what there is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.cli import main as cli
from auto_round.consumers.inventory import take_inventory
from auto_round.errors import CheckpointError, ConfigError
from consumers.folders import AUTO_ROUND, Case, compressed, names, write

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


def words(bits, size, n=256):
    groups = 1 if size is None else n // size
    return {
        "weight_packed": torch.zeros(n, n * bits // 32, dtype=torch.int32),
        "weight_scale": torch.ones(n, groups, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([n, n]),
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
BYTES = {"weight": torch.zeros(256, 256, dtype=torch.int8), "weight_scale": torch.ones(256, 1)}


@pytest.mark.parametrize(
    ("bits", "size", "group", "label", "kernel"),
    [
        (4, 128, {}, "W4 g128 sym", "Marlin"),
        (3, 32, {}, "W3 g32 sym", "Humming"),
        (5, None, {}, "W5 per row sym", "Humming"),
        (4, 16, {}, "W4 g16 sym", "Humming"),
        (4, 256, {}, "W4 g256 sym", "Triton"),
        (4, 32, {"input_activations": TOKEN}, "W4A8 g32 sym", "Marlin"),
        (2, 32, {"input_activations": TOKEN}, "W2A8 g32 sym", "Humming"),
    ],
)
def test_packed_words_of_compressed_tensors(tmp_path, bits, size, group, label, kernel):
    weights = {"num_bits": bits, "group_size": size, "strategy": "channel" if size is None else "group"}
    found = take_inventory(compressed(tmp_path / "m", weights, words(bits, size), **group))
    assert found.schemes == {label: (4, 4 * 256 * 256)}
    assert found.bits_per_weight == pytest.approx(bits + 16 / (size or 256) + 2 * 64 / 256**2)
    verdicts = {v.engine: v for v in found.verdicts}
    assert verdicts["vLLM"].kernels == {kernel: 2}
    assert ("Marlin leaves activations in 16 bits" in verdicts["vLLM"].notes) == (
        bool(group) and kernel == "Marlin"
    )
    assert verdicts["SGLang"].loads == (kernel == "Marlin" and not group)


@pytest.mark.parametrize(
    ("weights", "tensors", "group", "reason"),
    [
        ({"num_bits": 4, "group_size": 8}, words(4, 8), {}, "powers of two from 16"),
        (
            {"num_bits": 2, "group_size": 16},
            words(2, 16),
            {"input_activations": TOKEN},
            "powers of two from 32",
        ),
        ({"num_bits": 4, "group_size": 32}, words(4, 64), {}, "finds 4 groups of 256 inputs"),
        ({"num_bits": 4, "group_size": 32}, BYTES, {}, "another order of bytes"),
        (
            {"num_bits": 4, "strategy": "channel"},
            BYTES,
            {"format": "int-quantized", "input_activations": TOKEN},
            "no scheme on GPUs for W4A8",
        ),
        (
            {"num_bits": 8, "strategy": "channel"},
            BYTES,
            {"format": "int-quantized"},
            "no scheme for W8 per row",
        ),
        (
            {"num_bits": 4, "group_size": 32},
            words(4, 32),
            {"input_activations": {**TOKEN, "symmetric": False}},
            "no scheme for W4A8",
        ),
    ],
)
def test_compressed_tensors_that_vllm_has_nothing_for(tmp_path, weights, tensors, group, reason):
    found = take_inventory(compressed(tmp_path / "m", weights, tensors, **group))
    verdict = {v.engine: v for v in found.verdicts}["vLLM"]
    assert not verdict.loads
    assert reason in verdict.text


def test_bytes_of_eight_by_eight_bits(tmp_path):
    group = {"format": "int-quantized", "input_activations": TOKEN}
    folder = compressed(tmp_path / "m", {"num_bits": 8, "strategy": "channel"}, BYTES, **group)
    found = take_inventory(folder)
    assert found.schemes == {"W8A8 per row sym": (4, 4 * 256 * 256)}
    verdicts = {v.engine: v for v in found.verdicts}
    assert verdicts["vLLM"].loads
    assert verdicts["SGLang"].loads


def test_a_matrix_that_no_group_means(tmp_path):
    """vLLM keeps it in 16 bits, SGLang stops."""
    folder = compressed(tmp_path / "m", {"num_bits": 4, "group_size": 32}, words(4, 32))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn\..*"]
    (folder / "config.json").write_text(json.dumps(config))
    plain = {"model.layers.0.mlp.down_proj.weight": torch.zeros(256, 256, dtype=torch.bfloat16)}
    save_file(plain, folder / "model-2.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = {f: list(load_file(folder / f)) for f in ("model-1.safetensors", "model-2.safetensors")}
    index = {"weight_map": {name: file for file, listed in names.items() for name in listed}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    verdicts = {v.engine: v for v in take_inventory(folder).verdicts}
    assert verdicts["vLLM"].loads
    assert "no config group has a target" in verdicts["SGLang"].text


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
