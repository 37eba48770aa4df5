"""Conversion of folders: codes and steps stay the same, everything else byte for byte, or a refusal."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.checkpoint.reader import Checkpoint
from auto_round.cli import main as cli
from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.layouts.table import CHECKPOINT_LAYOUTS, layout_for
from auto_round.numerics.presets import int_format
from auto_round.numerics.qtensor import QTensor
from auto_round.pipeline.converting import convert
from auto_round.pipeline.converting.source import open_stored
from inference.folders import Request, write_folder
from pipeline.runs import SHORT, quantize

convert_folder = partial(convert.convert_folder, verify=False)
"""Most folders here hold some layers only."""

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "mlp.down_proj": (64, 96),
}

TUNED = {*SHORT, "iters", "disable_opt_rtn"} - {"group_size"}
"""Facts about a run, which GPTQ and AWQ folders do not hold."""


def weights(shapes=SHAPES, dtype=torch.float16):
    generator = torch.Generator().manual_seed(3)
    return {
        f"model.layers.{b}.{name}": (torch.randn(shape, generator=generator) * 0.1).to(dtype)
        for b in range(2)
        for name, shape in shapes.items()
    }


def write(
    folder, *, packing="auto_round", config=None, kept=(), eight=(), scale_dtype=torch.float16, **scheme
):
    """A folder of the `auto_round` format; returns its codes."""
    folder.mkdir()
    scheme = {"bits": 4, "group_size": 32, "sym": False, **scheme}
    layout = layout_for(packing)
    tensors = {
        "model.embed_tokens.weight": torch.randn(48, 64).to(torch.bfloat16),
        "model.layers.0.input_layernorm.weight": torch.ones(64),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(64).to(torch.float16),
    }
    codes = {}
    for name, w in weights().items():
        if any(part in name for part in kept):
            tensors[f"{name}.weight"] = w
            continue
        bits = 8 if any(part in name for part in eight) else scheme["bits"]
        fmt = int_format(bits, scheme["group_size"], sym=scheme["sym"], scale_dtype=scale_dtype)
        codes[name] = fmt.quantize(w.float() * (1.1 if scale_dtype is torch.float32 else 1))
        tensors |= {f"{name}.{suffix}": part for suffix, part in layout.pack(codes[name]).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    extra = {n: {"bits": 16, "data_type": "float"} for n in weights() if any(k in n for k in kept)}
    extra |= {n: {"bits": 8} for n in weights() if any(k in n for k in eight)}
    said = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": extra,
        "iters": 50,
        **scheme,
        **(config or {}),
    }
    if scale_dtype is not torch.float16:
        said["scale_dtype"] = str(scale_dtype)
    model = {"model_type": "llama", "dtype": "float16", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**model, "quantization_config": said}))
    (folder / "quantization_config.json").write_text(json.dumps(said))
    (folder / "tokenizer.json").write_bytes(b"\x00not touched\xff")
    (folder / "assets").mkdir()
    (folder / "assets" / "note.txt").write_text("nor this")
    return codes


def read(folder) -> dict[str, QTensor]:
    with Checkpoint.open(folder) as checkpoint:
        stored = open_stored(folder, checkpoint)
        return {name: stored.packed[name].read(checkpoint).weight for name in stored.plan.quantized}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, q in wanted.items():
        assert torch.equal(found[name].codes, q.codes), name
        assert set(found[name].scale.parts) == set(q.scale.parts), name
        for part, value in q.scale.parts.items():
            assert torch.equal(found[name].scale.parts[part].float(), value.float()), (name, part)


@pytest.mark.parametrize("sym", [True, False])
def test_round_trip(tmp_path, sym):
    codes = write(tmp_path / "a", sym=sym, kept=("v_proj", "k_proj", "q_proj"))
    same(read(tmp_path / "a"), codes)
    source = tmp_path / "a"
    formats = ["auto_gptq", "auto_awq", "gptqmodel", "auto_round:auto_gptq", "auto_round:gptqmodel"]
    for number, name in enumerate(formats):
        done = convert_folder(source, name, tmp_path / str(number))
        assert done.folder == tmp_path / str(number)
        assert (done.format, done.layers) == (name, len(codes))
        same(read(done.folder), codes)
        assert (done.folder / "tokenizer.json").read_bytes() == b"\x00not touched\xff"
        assert (done.folder / "assets" / "note.txt").read_text() == "nor this"
        source = done.folder
    old, new = (load_file(f / "model.safetensors") for f in (tmp_path / "a", source))
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) and old[n].dtype == new[n].dtype for n in old)


def test_zero_points_of_zero_survive_version_1(tmp_path):
    codes = write(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.qzeros"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    codes = read(tmp_path / "a")
    assert not codes[name].scale.parts["zero"].any()
    convert_folder(tmp_path / "a", "auto_gptq", tmp_path / "b")
    same(read(tmp_path / "b"), codes)


def test_names_dtypes_and_configuration(tmp_path):
    write(tmp_path / "a", sym=True, eight=("down_proj",), kept=("layers.1.mlp",))
    convert_folder(tmp_path / "a", "auto_gptq")
    out = tmp_path / "a-auto_gptq"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", 4, True)
    assert json.loads((out / "quantization_config.json").read_text()) == config
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.qweight"].shape == (96 * 8 // 32, 64)
    assert torch.equal(tensors[f"{name}.g_idx"], torch.arange(96, dtype=torch.int32) // 32)
    assert "model.layers.1.mlp.down_proj.weight" in tensors
    convert_folder(out, "auto_round", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert back["packing_format"] == "auto_round:auto_gptq"
    assert back["extra_config"] == {
        name: {"bits": 8},
        "model.layers.1.mlp.down_proj": {"bits": 16, "data_type": "float"},
    }
    same(read(tmp_path / "back"), read(tmp_path / "a"))


def test_configuration_says_what_a_run_would_have_said(tiny, tmp_path):
    """Kept matrices of all kinds: in blocks, beside them, bare parameters, a router, the head."""
    model = shutil.copytree(
        tiny("qwen3_moe", head_dim=16, moe_intermediate_size=32), tmp_path / "model", dirs_exist_ok=True
    )
    further = {
        "mtp.fc.weight": (64, 128),
        "model.layers.0.conv.weight": (64, 1, 4),
        "model.layers.0.mixer.experts.gate_up_proj": (4, 64, 64),
    }
    path = model / "model.safetensors"
    tensors = load_file(path) | {n: torch.zeros(shape, dtype=torch.bfloat16) for n, shape in further.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "verify": False}
    formats = ["auto_round", "auto_gptq", "auto_awq"]
    result = quantize(model, tmp_path / "out", format=",".join(formats), ignore_layers="v_proj", **plain)
    wanted = {name: said(folder) for name, folder in zip(formats, result.folders, strict=True)}
    assert "-:^mtp\\.fc$" in wanted["auto_gptq"]["dynamic"]
    assert "model.layers.0.conv" in wanted["auto_round"]["extra_config"]
    for old, folder in zip(formats, result.folders, strict=True):
        for new in set(formats) - {old}:
            assert said(convert_folder(folder, new, tmp_path / f"{old}-{new}").folder) == wanted[new]


def said(folder):
    """What a configuration says of layers, the order of names left out."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config |= {k: sorted(v) for k, v in config.items() if k == "modules_to_not_convert"}
    return {k: v for k, v in config.items() if k not in TUNED}


def test_foreign_folders(tmp_path):
    """GPTQ as other tools write it: no block name, `g_idx`, one rule of GPTQModel's."""
    codes = write(tmp_path / "a", sym=True, kept=("layers.1.mlp.down_proj",))
    layout = CHECKPOINT_LAYOUTS["gptq"]
    tensors = {f"{n}.{s}": p for n, q in codes.items() for s, p in layout.pack(q).items()}
    kept = "model.layers.1.mlp.down_proj.weight"
    tensors[kept] = weights()[kept.removesuffix(".weight")]
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    said["dynamic"] = {r"-:.*layers\.1\.mlp\.down_proj": {}}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": said}))
    convert_folder(tmp_path / "a", "auto_round", tmp_path / "b")
    same(read(tmp_path / "b"), codes)

    tensors["model.layers.0.mlp.down_proj.g_idx"] = torch.arange(96, dtype=torch.int32).flip(0) // 32
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r'"model\.layers\.0\.mlp\.down_proj".*reordered'):
        convert_folder(tmp_path / "a", "auto_round", tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({"bits": 3}, "auto_awq", "4 bits"),
        ({"eight": ("down_proj",)}, "auto_awq", "down_proj"),
        ({"bits": 5}, "auto_gptq", "5 bits"),
        ({}, "fake", "no format of packed numbers"),
        ({}, "gguf:q4_0", "a GGUF file is made from the original model"),
        ({"bits": 3}, "auto_round:auto_gptq", "off by one step"),
    ],
)
def test_refusals(tmp_path, options, target, message):
    write(tmp_path / "a", **options)
    with pytest.raises(UnsupportedError, match=message):
        convert_folder(tmp_path / "a", target, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_rows_that_are_filled_up_are_refused(tmp_path):
    """A folder of auto-round's model-free mode: where groups divide the rows, nothing was filled."""
    for size in (32, 96):
        (tmp_path / f"{size}").mkdir()
        write_folder(tmp_path / f"{size}", Request(group_size=size, config=(("model_free", True),)))
    with Checkpoint.open(tmp_path / "32") as checkpoint:
        assert open_stored(tmp_path / "32", checkpoint).plan.quantized
    with (
        Checkpoint.open(tmp_path / "96") as checkpoint,
        pytest.raises(UnsupportedError, match=r"(?s)filled up to whole groups.*up_proj"),
    ):
        open_stored(tmp_path / "96", checkpoint)


def test_a_new_folder_that_does_not_load_is_not_left(tmp_path, capsys):
    write(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"does not load and run|not found in it"):
        convert.convert_folder(tmp_path / "a", "auto_awq", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert cli.main(["convert", str(tmp_path / "a"), "--format", "auto_awq"]) == 1


def test_steps_of_another_dtype(tmp_path):
    codes = write(tmp_path / "a", sym=True, scale_dtype=torch.bfloat16)
    convert_folder(tmp_path / "a", "auto_gptq", tmp_path / "b")  # 8 bits of mantissa fit into 11
    same(read(tmp_path / "b"), codes)
    assert (
        load_file(tmp_path / "b" / "model.safetensors")["model.layers.0.mlp.down_proj.scales"].dtype
        == torch.float16
    )
    write(tmp_path / "c", sym=True, scale_dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"\"model\.layers\.\d\.[\w.]+\" cannot be converted exactly"):
        convert_folder(tmp_path / "c", "auto_gptq", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "d.partial").exists()


def test_configuration_and_tensors_must_agree(tmp_path):
    write(tmp_path / "a", config={"group_size": 64})
    with pytest.raises(CheckpointError, match=r"3 groups a row of 96"):
        convert_folder(tmp_path / "a", "auto_awq", tmp_path / "b")


def test_wrong_requests(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ConfigError, match="unknown format"):
        convert_folder(tmp_path / "a", "auto_gpt", tmp_path / "b")
    with pytest.raises(ConfigError, match="one format at a time"):
        convert_folder(tmp_path / "a", "auto_gptq,auto_awq", tmp_path / "b")
    with pytest.raises(ConfigError, match="is or holds what is read"):
        convert_folder(tmp_path / "a", "auto_awq", tmp_path / "a")


def test_command(tmp_path, capsys):
    write(tmp_path / "a")
    assert (
        cli.main(
            [
                *("convert", str(tmp_path / "a"), "--format", "auto-awq"),
                *("--output_dir", str(tmp_path / "b"), "--no-verify"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "8, with the same codes" in out
    assert "vLLM" in out
    assert cli.main(["convert", "--help"]) == 0
    assert "--output" in capsys.readouterr().out
    assert cli.main(["convert", str(tmp_path / "a")]) == 2
    assert "--format" in capsys.readouterr().err


def test_demo_model(tmp_path):
    """auto_round -> GPTQ -> AWQ -> auto_round: the file of packed tensors comes back byte for byte."""
    source = load_file(DEMO / "model.safetensors")
    fmt, layout, tensors, count = int_format(4, 128, sym=True), layout_for("auto_round:auto_gptq"), {}, 0
    for name, w in source.items():
        if w.dim() == 2 and ".layers." in name:
            parts = layout.pack(fmt.quantize(w.float()))
            tensors |= {f"{name.removesuffix('.weight')}.{s}": p for s, p in parts.items()}
            count += 1
        else:
            tensors[name] = w
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    said = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
    }
    said |= {"sym": True, "data_type": "int", "block_name_to_quantize": "model.layers"}
    config = json.loads((DEMO / "config.json").read_text()) | {"quantization_config": said}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    at = tmp_path / "a"
    for name in ("auto_gptq", "auto_awq", "auto_round:auto_gptq"):
        done = convert.convert_folder(at, name, tmp_path / name.replace(":", "-"))
        assert done.verified == {"tokens": 1}
        at = done.folder
    back = load_file(at / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
    assert count == 42
