"""A new number type is one file and one row: it is planned, searched, tuned, packed, written and loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.layouts.compressed_table import COMPRESSED
from auto_round.layouts.table import LAYOUTS
from auto_round.numerics.activation import TokenInt
from auto_round.numerics.importance import Importance
from auto_round.numerics.search import QUICK, THOROUGH, search_knobs
from auto_round.schemes.number_types import NUMBER_TYPES
from auto_round.schemes.scheme import parse_scheme
from auto_round.testing.format_kit import check_format
from auto_round.testing.layout_kit import check_round_trip
from auto_round.tuning.config import TuneConfig
from auto_round.tuning.quantized_inputs import quantized_inputs
from auto_round.tuning.samples import Samples
from auto_round.tuning.sign_round import tune_block
from inference.folders import Request, write_folder
from numerics.made_up import FORMAT, NAME, ROW, Nibbles
from pipeline.runs import quantize, weights
from tuning.blocks import HIDDEN, Mlp, generator, tasks

FIELDS = {"data_type": NAME, "bits": 4, "group_size": 16}


@pytest.fixture(autouse=True)
def _one_row(monkeypatch):
    monkeypatch.setitem(NUMBER_TYPES, NAME, ROW)


def test_it_passes_the_kit_of_formats():
    check_format(FORMAT)


def test_a_scheme_names_it():
    assert parse_scheme(FIELDS).weight_format() == FORMAT
    assert parse_scheme({"data_type": "made_up4", "group_size": 16}).weight_format() == FORMAT
    options = build_options({"model": "m", "data_type": NAME, "bits": 4, "group_size": 16}).scheme
    assert parse_scheme(options.scheme, options.overrides()).weight_format() == FORMAT


def test_what_it_does_not_have_is_refused():
    with pytest.raises(UnsupportedError, match="has groups of 16, not of 32"):
        parse_scheme({**FIELDS, "group_size": 32}).weight_format()
    with pytest.raises(UnsupportedError, match="made-up numbers of 4 bits are"):
        parse_scheme({**FIELDS, "bits": 5}).weight_format()
    with pytest.raises(UnsupportedError, match=f'act_data_type "{NAME}" with 8 bits is not there yet'):
        parse_scheme({**FIELDS, "act_bits": 8}).weight_format()


def error(w, knobs, squares):
    """Weighted squared error of each row."""
    seen = FORMAT.dequantize(FORMAT.quantize(w, knobs))
    return ((seen - w).square() * squares).sum(-1)


def test_its_ranges_are_searched():
    w, squares = torch.randn(24, 96, generator=generator(0)), torch.rand(96, generator=generator(1)) + 0.1
    plain = error(w, None, squares)
    quick, thorough = (
        error(w, search_knobs(FORMAT, w, Importance(squares), e), squares) for e in (QUICK, THOROUGH)
    )
    assert thorough.sum() < quick.sum() < 0.9 * plain.sum()
    assert (thorough <= plain * (1 + 1e-5)).all()


def few_directions(block, n, seed):
    """Inputs that live near a few directions, as hidden states do, and the block's outputs."""
    basis = torch.randn(6, HIDDEN, generator=generator(9))
    x = torch.randn(n, 8, 6, generator=generator(seed)) @ basis
    return Samples((x,), (block(x),))


def test_it_is_tuned():
    block = Mlp()
    data, held_out, unseen = (few_directions(block, n, seed) for n, seed in ((48, 1), (16, 2), (16, 3)))

    def loss(iters):
        config = TuneConfig(iters=iters, batch_size=16)
        tuned = tune_block(block, tasks(block, FORMAT), data, held_out, config, generator=generator())
        changed = {name: q.format.dequantize(q) for name, q in tuned.weights.items()}
        output = torch.func.functional_call(block, changed, unseen.inputs)
        return (output - unseen.targets[0]).square().mean().item()

    assert loss(60) < 0.9 * loss(0)


def test_it_is_packed_and_unpacked():
    q = FORMAT.quantize(torch.randn(6, 64, generator=generator(0)))
    check_round_trip(Nibbles(), q)


def test_a_model_is_tuned_and_written(tiny, tmp_path):
    """Planned from options alone; the reloaded folder predicts what the tuned model predicted."""
    result = quantize(tiny("llama"), tmp_path / "out", format="fake", **FIELDS)
    scheme = result.plan.entries["model.layers.0.mlp.down_proj"].scheme
    assert scheme.weight_format() == FORMAT
    w = weights(result.folders[0])["model.layers.0.mlp.down_proj.weight"].float()
    # Two signs of at most seven sizes and 0 in a group of 16, each rounded to bfloat16.
    assert all(len(group.unique()) <= 15 for group in w.reshape(-1, 16))
    assert len(w.unique()) > 100


def test_the_words_of_a_configuration_are_in_the_row(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(COMPRESSED, "nibbles", Nibbles())
    layers = {"down_proj": {"data_type": "int", "bits": 8, "group_size": 32}}
    result = quantize(
        tiny("llama"), tmp_path / "out", format="llm_compressor", layer_config=layers, verify=False, **FIELDS
    )
    config = json.loads((result.folders[0] / "quantization_config.json").read_text())
    found = {
        (g["format"], g["weights"]["type"], g["weights"]["strategy"])
        for g in config["config_groups"].values()
    }
    assert found == {("nibbles", "float", "tensor_group"), ("pack-quantized", "int", "group")}
    assert config["format"] == "mixed-precision"
    stored = weights(result.folders[0])
    name = "model.layers.0.self_attn.q_proj"
    assert {n.rpartition(".")[2] for n in stored if n.startswith(name)} == {"codes", "scale", "shared"}
    assert stored[f"{name}.scale"].dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("rounded_inputs", [False, True])
def test_a_folder_of_two_types_and_two_orders_of_bytes_is_loaded(tmp_path, monkeypatch, rounded_inputs):
    """One layer of an ordinary folder is stored in the new type, in a layout of its own."""
    by_token = TokenInt(6, sym=True)
    runs = dataclasses.replace(ROW, input_bits=(6,), inputs=lambda fields: by_token, runs_inputs=True)
    monkeypatch.setitem(NUMBER_TYPES, NAME, runs)
    monkeypatch.setitem(LAYOUTS, "nibbles", Nibbles())
    model = write_folder(tmp_path, Request())
    layer = "model.layers.1.mlp.down_proj"
    tensors = {k: t for k, t in load_file(tmp_path / "model.safetensors").items() if not k.startswith(layer)}
    q = FORMAT.quantize(0.1 * torch.randn(128, 256, generator=generator(3)))
    parts = {f"{layer}.{suffix}": part for suffix, part in Nibbles().pack(q).items()}
    save_file({**tensors, **parts}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    fields = {**FIELDS, "packing_format": "nibbles"} | ({"act_bits": 6} if rounded_inputs else {})
    config["quantization_config"]["extra_config"] = {layer: fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        model.get_parameter(f"{layer}.weight").copy_(FORMAT.dequantize(q))
        ids = torch.arange(2, 34).view(2, 16)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        plain = model(ids).logits
        with quantized_inputs(model, {layer: by_token} if rounded_inputs else {}):
            want = model(ids).logits
        assert torch.equal(loaded(ids).logits, want)
        assert torch.equal(want, plain) is not rounded_inputs
    state = loaded.state_dict()
    assert all(torch.equal(state[name], part) for name, part in parts.items())
