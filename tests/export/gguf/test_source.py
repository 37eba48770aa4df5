"""GGUF files as input: the tensors are those that the `gguf` package finds, under the model's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.cli.inspect import inspect
from auto_round.config import build_options
from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.evaluate.gguf_weights import gguf_weights
from auto_round.export.gguf.source import open_gguf
from auto_round.log import ignore_progress
from auto_round.models.folder import FolderSource
from auto_round.numerics.presets import int_format
from auto_round.pipeline.dry_run import dry_run
from auto_round.pipeline.quantize import run
from export.gguf.small_models import save_small_model
from stored.makers import mxfp4
from stored.twins import in_blocks, make_twins

gguf = pytest.importorskip("gguf")
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}


def write(model: Path, out: Path, form: str, **given: Any) -> Path:
    """The GGUF file of a model, plainly rounded."""
    plain = {"iters": 0, "disable_opt_rtn": True, "verify": False, "device_map": "cpu"}
    run(
        build_options({"model": str(model), "output_dir": str(out), "format": form, **plain, **given}),
        ignore_progress,
    )
    (path,) = out.rglob("*.gguf")
    return path


@pytest.mark.parametrize(
    ("family", "form", "changes"),
    [
        ("llama", "gguf:q4_k_m", WIDE),
        ("llama", "gguf:mxfp4", {}),
        ("qwen3", "gguf:q8_0", {}),
        ("qwen2", "gguf:q5_0", {}),
        ("qwen3_moe", "gguf:q4_0", {}),
        ("gemma2", "gguf:f16", {}),
        ("gpt2", "gguf:q8_0", {}),
        ("stablelm", "gguf:bf16", {}),
    ],
)
def test_tensors_are_those_of_the_package(
    family: str, form: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = save_small_model(family, tmp_path / "m", **changes)
    file = write(model, tmp_path / "out", form)
    wanted = dict(gguf_weights(model, file))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (model / name).is_file():
            shutil.copy(model / name, file.parent / name)
    with open_gguf(file.parent) as source, FolderSource.open(model) as original:
        assert set(source.tensors) == set(wanted) == set(original.tensors)
        for name, value in wanted.items():
            spec = source.tensors[name]
            assert tuple(spec.shape) == tuple(original.tensors[name].shape)
            assert torch.equal(source.read_tensor(name), value.to(spec.dtype).reshape(spec.shape)), name


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_configuration_and_tokenizer_come_from_the_file(family: str, tmp_path: Path) -> None:
    """A file alone gives the codes of its plain twin."""
    model = save_small_model(family, tmp_path / "m")
    file = write(model, tmp_path / "out", "gguf:q8_0")
    given = {"group_size": 32, "iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "verify": False}
    options = build_options({"model": str(file), "output_dir": str(tmp_path / "w4"), **given})
    assert dry_run(options).job.plan.quantized
    run(options, ignore_progress)
    weights = dict(gguf_weights(model, file))
    with FolderSource.open(tmp_path / "w4") as source:
        fmt = int_format(4, 32, sym=True)
        for layer in source.layers[:3]:
            wanted = fmt.quantize(weights[layer.tensor].to(torch.bfloat16))
            assert torch.equal(source.read(layer), fmt.dequantize(wanted, torch.bfloat16))
    assert (tmp_path / "w4" / "tokenizer.json").is_file()


def test_numbers_of_mxfp4_move_into_a_file_as_they_are(tmp_path: Path) -> None:
    """Plain rounding gives numbers of MXFP4 themselves, by smaller powers of two where a group is small."""
    model = save_small_model("llama", tmp_path / "m")
    said = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": said}},
    }
    twins = make_twins(tmp_path / "twins", model, config, mxfp4, in_blocks)
    file = write(twins.packed, tmp_path / "out", "gguf:mxfp4")
    found = dict(gguf_weights(twins.plain, file))
    with FolderSource.open(twins.packed) as source:
        for layer in source.layers:
            if layer.block is not None:
                assert torch.equal(found[layer.tensor], source.read(layer).float()), layer.name


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    model = save_small_model("llama", tmp_path / "m")
    file = write(model, tmp_path / "out", "gguf:q8_0")
    other = save_small_model("llama", tmp_path / "o", rms_norm_eps=1e-3)
    shutil.copy(other / "config.json", file.parent / "config.json")
    with pytest.raises(UnsupportedError, match="rms_epsilon"):
        open_gguf(file.parent)
    deeper = save_small_model("llama", tmp_path / "d", num_hidden_layers=3)
    shutil.copy(deeper / "config.json", file.parent / "config.json")
    with pytest.raises(UnsupportedError, match="block_count"):
        open_gguf(file.parent)
    (file.parent / "config.json").unlink()
    shutil.copy(file, file.parent / "second.gguf")
    with pytest.raises(ConfigError, match="several GGUF files"):
        open_gguf(file.parent)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_gguf(tmp_path / "bad.gguf")


def test_inspect_says_which_types_a_file_holds(tmp_path: Path) -> None:
    """It wanted a config.json, which no GGUF output of a run has."""
    path = write(save_small_model("llama", tmp_path / "model", **WIDE), tmp_path / "out", "gguf:q4_0")
    text = inspect([str(path.parent)])
    assert text == inspect([str(path)])
    assert f"GGUF, architecture llama: {path.name}" in text
    found = {str(tensor.tensor_type.name): 0 for tensor in gguf.GGUFReader(path).tensors}
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.tensor_type.name] += int(tensor.n_elements)
    assert "Q4_0" in found
    for kind, weights in found.items():
        assert f" tensors, {weights:,} weights" in next(
            x for x in text.splitlines() if x.startswith(f"{kind} ")
        )
    types = json.loads(inspect(["--json", str(path)]))["types"]
    assert {kind.upper(): each["weights"] for kind, each in types.items()} == found
    (tmp_path / "none.gguf").write_bytes(b"GGUX")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        inspect([str(tmp_path / "none.gguf")])
