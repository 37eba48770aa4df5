"""The Python calls end to end on a tiny random model: what is written is what is returned."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from auto_round import AutoRound
from auto_round.cli.main import main_rtn
from auto_round.errors import CannotHoldError, ConfigError, UnsupportedError
from auto_round.pipeline.converting.convert import convert_folder
from auto_round.testing.tiny_models import save_tiny_model

IDS = torch.arange(12).view(1, 12) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    return save_tiny_model("qwen3", path, dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Sizes that blocks of 128 divide."""
    path = tmp_path_factory.mktemp("model") / "wide"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    return save_tiny_model("qwen3", path, dtype=torch.bfloat16, **sizes)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 64, (20, 16), generator=generator).tolist()


def quantizer(model, rows, **named):
    settings = {"bits": 4, "group_size": 32, "nsamples": 8, "seqlen": 16, "iters": 2, "batch_size": 4}
    return AutoRound(model, dataset=rows, **{**settings, **named})


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_quantize_then_save_in_several_formats(folder, rows, tmp_path):
    rounder = quantizer(folder, rows)
    with pytest.raises(ConfigError, match="call quantize"):
        rounder.save_quantized(tmp_path / "early")
    model, schemes = rounder.quantize()
    assert schemes["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert "lm_head" not in schemes
    wanted = logits(model)
    folders = rounder.save_quantized(
        tmp_path / "many", format="auto_round:gptqmodel,auto_round:auto_awq,auto_round"
    )
    assert [f.parent for f in folders] == [tmp_path / "many"] * 3
    (fake,) = rounder.save_quantized(tmp_path / "fake", format="fake")
    for path in folders:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path, dtype="auto")), wanted)
        assert "quantization_config" in json.loads((path / "config.json").read_text())
    rounded = logits(AutoModelForCausalLM.from_pretrained(fake, dtype="auto"))
    assert (rounded - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert "quantization_config" not in json.loads((fake / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="mlx"):
        rounder.save_quantized(tmp_path / "mlx", format="mlx")
    with pytest.raises(ConfigError, match="GGUF"):
        rounder.save_quantized(tmp_path / "gguf", format="gguf:q4_0")


def test_a_format_that_would_have_made_another_plan_is_refused_in_words(rows, tmp_path):
    """Folders of GPTQ have one group size; codes of another one ended in an error about a tensor's shape."""
    sizes = {"hidden_size": 128, "intermediate_size": 288}
    uneven = save_tiny_model("llama", tmp_path / "uneven", dtype=torch.bfloat16, **sizes)
    rounder = AutoRound(uneven, iters=0, disable_opt_rtn=True)
    rounder.quantize()
    with pytest.raises(CannotHoldError, match=r"(?s)before quantize\(\).*W4 g128 sym instead of W4 g32 sym"):
        rounder.save_quantized(tmp_path / "gptq", format="auto_gptq")
    assert not (tmp_path / "gptq").exists()
    assert rounder.save_quantized(tmp_path / "own", format="auto_round") == [tmp_path / "own"]
    advised = AutoRound(uneven, iters=0, disable_opt_rtn=True, format="auto_gptq")
    advised.quantize()
    assert advised.save_quantized(tmp_path / "gptq") == [tmp_path / "gptq"]


def test_a_format_that_wants_scales_of_another_dtype_is_refused_in_words(folder, rows, tmp_path):
    """llm_compressor stores steps in the model's dtype: that ended in an error about a tensor's dtype."""
    rounder = quantizer(folder, rows, iters=0, disable_opt_rtn=True)
    rounder.quantize()
    match = r"(?s)save it as auto_round, or .*W4 g32 sym instead of W4 g32 sym bfloat16"
    with pytest.raises(CannotHoldError, match=match):
        rounder.save_quantized(tmp_path / "other", format="llm_compressor")
    assert not (tmp_path / "other").exists()


def test_a_model_in_memory_gives_the_same_as_its_folder_and_stays_as_it_is(folder, rows, tmp_path):
    events = []
    live = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before = {n: p.clone() for n, p in live.named_parameters()}
    first, (path,) = quantizer(live, rows, progress=events.append).quantize_and_save(tmp_path / "live")
    none, _ = quantizer(folder, rows).quantize_and_save(tmp_path / "disk", load=False)
    assert none is None
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", dtype="auto")
    assert path == tmp_path / "live"
    assert torch.equal(logits(first), logits(second))
    assert all(torch.equal(p, before[n]) for n, p in live.named_parameters())
    assert {event.stage for event in events} >= {"tune", "write"}
    assert sum(event.stage == "tune" for event in events) == 2


def test_an_occupied_folder_is_left_alone(folder, rows, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="mine"):
        quantizer(folder, rows).quantize_and_save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_command_writes_a_named_folder_and_a_summary(folder, tmp_path, capsys):
    code = main_rtn([str(folder), "--group-size", "32", "--output_dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert (tmp_path / "tiny-w4g32" / "config.json").is_file()
    assert "times smaller" in out
    assert "rounding 2/2" in err


def test_a_gptq_folder_is_loaded_and_written_again_from_its_codes(folder, rows, tmp_path):
    rounder = quantizer(folder, rows, format="auto_gptq", iters=0, disable_opt_rtn=True)
    model, _ = rounder.quantize()
    wanted = logits(model)
    (again,) = rounder.save_quantized(tmp_path / "again", format="auto_round")
    other = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float16)
    assert torch.equal(logits(other), wanted)
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("scheme", ["FP8_STATIC", "NVFP4"])
def test_what_calibration_fixed_is_written_again(folder, rows, tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    given = {"bits": None, "group_size": None, "iters": 0, "disable_opt_rtn": True}
    rounder = quantizer(folder, rows, format="llm_compressor", scheme=scheme, **given)
    rounder.quantize()
    (again,) = rounder.save_quantized(tmp_path / "again", format="llm_compressor")
    paths = [again, *rounder.save_quantized(tmp_path / "both", format="llm_compressor,fake")]
    first, second = (load_file(path / "model.safetensors") for path in paths[:2])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)
    assert sum(name.endswith(("input_scale", "input_global_scale")) for name in first) == 10


def test_scales_of_the_cache_are_written_again(folder, rows, tmp_path):
    pytest.importorskip("compressed_tensors")
    given = {"iters": 0, "disable_opt_rtn": True, "static_kv_dtype": torch.float8_e4m3fn}
    rounder = quantizer(folder, rows, format="llm_compressor", scheme="W8A16", **given)
    rounder.quantize()
    paths = [rounder.save_quantized(tmp_path / name, format="llm_compressor")[0] for name in ("one", "two")]
    first, second = (load_file(path / "model.safetensors") for path in paths)
    scales = [name for name in first if name.endswith(("k_scale", "v_scale"))]
    assert scales
    assert all(torch.equal(first[name], second[name]) for name in scales)


HELD = {
    "activations of whole numbers": {"bits": 4, "act_bits": 8, "act_group_size": -1},
    "a width that nobody packs": {"bits": 5},
    "a mixture with one": {"scheme": "W4A16", "bits": None, "layer_config": {"mlp": {"bits": 5}}},
}
"""Plans that `auto_round` cannot hold and `fake` can."""


@pytest.mark.parametrize("name", HELD)
def test_where_nobody_chose_a_format_rounded_weights_hold_what_the_usual_one_cannot(
    wide, rows, tmp_path, caplog, name
):
    plain = {"iters": 0, "disable_opt_rtn": True, **HELD[name]}
    rounder = quantizer(wide, rows, **plain)
    model, schemes = rounder.quantize()
    assert schemes
    assert "nobody chose a format, and auto_round cannot be it" in caplog.text
    assert not hasattr(model.config, "quantization_config")
    (folder,) = rounder.save_quantized(tmp_path / "fake", format="fake")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto")), logits(model))
    with pytest.raises(CannotHoldError, match=r"formats that can: .*fake"):
        rounder.save_quantized(tmp_path / "out")
    with pytest.raises(ConfigError, match="only the rounded weights were kept"):
        rounder.save_quantized(tmp_path / "codes", format="llm_compressor")


@pytest.mark.parametrize("name", HELD)
def test_a_chosen_format_and_a_folder_that_stays_are_never_changed(wide, rows, tmp_path, name):
    plain = {"iters": 0, "disable_opt_rtn": True, **HELD[name]}
    with pytest.raises(CannotHoldError, match="auto_round"):
        quantizer(wide, rows, format="auto_round", **plain).quantize()
    with pytest.raises(CannotHoldError, match=r"formats that can: .*fake"):
        quantizer(wide, rows, **plain).quantize_and_save(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["MXFP4", "FP8_STATIC"])
def test_the_usual_format_is_taken_where_it_holds_activations(folder, rows, tmp_path, scheme):
    plain = {"bits": None, "group_size": None, "iters": 0, "disable_opt_rtn": True, "scheme": scheme}
    rounder = quantizer(folder, rows, **plain)
    model, _ = rounder.quantize()
    assert model.config.quantization_config.quant_method == "auto-round"
    (again,) = rounder.save_quantized(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again, dtype="auto")), logits(model))


def test_a_mixture_of_both_kinds_of_numbers_is_written_again(folder, rows, tmp_path):
    plain = {"bits": None, "group_size": None, "iters": 0, "disable_opt_rtn": True}
    rules = {"down_proj": "W8A16", "layers.1.self_attn": {"bits": 4, "data_type": "int", "act_bits": 16}}
    rounder = quantizer(folder, rows, scheme="MXFP4", layer_config=rules, **plain)
    model, _ = rounder.quantize()
    folders = rounder.save_quantized(tmp_path / "again", format="auto_round,fake")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")), logits(model))


def test_the_model_is_never_replaced_by_what_is_made_of_it(folder, tmp_path):
    """A folder of ours makes way for a newer output, but not for one that is made from it."""
    plain = {"iters": 0, "disable_opt_rtn": True, "group_size": 32, "verify": False}
    both = tmp_path / "both"
    AutoRound(folder, **plain).quantize_and_save(both, format="auto_round,auto_gptq", load=False)
    model = both / "auto_round"
    before = {path: path.read_bytes() for path in both.rglob("*") if path.is_file()}
    again = AutoRound(model, **plain)
    for output in (model, both):
        with pytest.raises(ConfigError, match="is or holds what is read"):
            again.quantize_and_save(output, overwrite=True)
        with pytest.raises(ConfigError, match="is or holds what is read"):
            convert_folder(model, "auto_gptq", output)
    again.quantize()
    with pytest.raises(ConfigError, match="is or holds what is read"):
        again.save_quantized(model)
    assert {path: path.read_bytes() for path in both.rglob("*") if path.is_file()} == before


def test_the_model_is_read_when_somebody_looks_at_it(folder, tmp_path, monkeypatch):
    read = []
    own = AutoRound._read
    monkeypatch.setattr(AutoRound, "_read", lambda self, path: read.append(path) or own(self, path))
    rounder = AutoRound(folder, iters=0, disable_opt_rtn=True, group_size=32)
    first = rounder.quantize_and_save(tmp_path / "first")
    assert isinstance(first, tuple)
    assert first[1] == first[-1] == [tmp_path / "first"]
    second = rounder.quantize_and_save(tmp_path / "second", load=False)
    assert read == []
    assert tuple(second) == (None, [tmp_path / "second"])
    model, folders = first
    assert (read, folders) == ([tmp_path / "first"],) * 2
    assert first[0] is first[-2] is first[:1][0] is model
    with pytest.raises(IndexError):
        first[2]


def test_paths_begin_where_the_program_stood_when_it_gave_them(folder, tmp_path, monkeypatch):
    """A relative model and data, another folder between any two calls; cards keep what was written."""
    there, elsewhere = tmp_path / "Bob's, there", tmp_path / "elsewhere"
    (there / "m").mkdir(parents=True)
    elsewhere.mkdir()
    (there / "m" / "tiny").symlink_to(folder)
    ids = list(range(3, 19))
    (there / "rows.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for _ in range(4)))
    monkeypatch.chdir(there)
    rounder = quantizer("m/tiny", "rows.jsonl:num=4", seqlen=8, iters=1)
    assert rounder.dataset == "rows.jsonl:num=4"
    monkeypatch.chdir(elsewhere)
    rounder.quantize()
    monkeypatch.chdir(tmp_path)
    (path,) = rounder.save_quantized("out", format="auto_gptq")
    assert path.resolve() == tmp_path / "out"
    report = json.loads((path / "report.json").read_text())
    assert report["calibration"]["dataset"] == "rows.jsonl:num=4"
    assert "base_model" not in (path / "README.md").read_text()  # m/tiny is no name on a hub
    (again,) = rounder.save_quantized()
    assert again == there / "tmp_autoround"
    saved = rounder.quantize_and_save("direct")
    monkeypatch.chdir(there)
    assert saved[0] is rounder.model is not None


def test_folders_of_images_begin_there_too(folder, tmp_path, monkeypatch):
    there = tmp_path / "there"
    (there / "pictures").mkdir(parents=True)
    monkeypatch.chdir(there)
    rounders = [
        AutoRound(folder, iters=0, disable_opt_rtn=True, group_size=32, extra_data_dir=text)
        for text in ("pictures", "image=pictures,video=films")
    ]
    monkeypatch.chdir(tmp_path)
    for rounder, text in zip(rounders, ("pictures", "image=pictures,video=films"), strict=True):
        assert rounder.extra_data_dir == text
        rounder.quantize()
