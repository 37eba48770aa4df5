"""GGUF files from end to end, read back by the `gguf` package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config import build_options
from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.evaluate.gguf_weights import gguf_weights
from auto_round.export.gguf.source import open_gguf
from auto_round.export.gguf.tensors import RotaryPairs
from auto_round.log import ignore_progress
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from export.gguf.reread import reread
from export.gguf.small_models import FAMILIES, byte_level_tokenizer, save_small_model, sentencepiece_tokenizer

gguf = pytest.importorskip("gguf")


def _run(model: Path, out: Path, form: str, progress: Any = ignore_progress, **given: Any) -> Result:
    options = {
        "model": str(model),
        "output_dir": str(out),
        "format": form,
        "iters": 0,
        "disable_opt_rtn": True,
        "device_map": "cpu",
        **given,
    }
    return run(build_options(options), progress)


def _file(out: Path) -> Path:
    (path,) = out.glob("*.gguf")
    return path


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Dequantized tensors by name, by the other package's arithmetic."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        found[tensor.name] = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(
            shape
        )
    return found


def _types(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(
        "llama",
        tmp_path_factory.mktemp("llama") / "tiny-llama",
        hidden_size=256,
        intermediate_size=320,
        tokenizer=sentencepiece_tokenizer(),
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_keeps_its_numbers_in_16_bits(family: str, tmp_path: Path) -> None:
    """Every weight of the source is in the file, whatever happened to its rows."""
    model = save_small_model(family, tmp_path / "m")
    result = _run(model, tmp_path / "out", "gguf:f16")
    path = _file(tmp_path / "out")
    assert path.name == "m-F16.gguf"
    assert result.report["verified"]["gguf:f16"]["tensors"] == len(_tensors(path))
    shift = 1.0 if family.startswith("gemma") else 0.0
    total = sum(float(t.double().sum()) for name, t in _tensors(path).items())
    with Checkpoint.open(model) as checkpoint:
        weights = {name: checkpoint.read(name).double() for name in checkpoint.names}
    expected = sum(float(w.sum()) + (shift * w.numel() if "norm" in n else 0) for n, w in weights.items())
    count = sum(w.numel() for w in weights.values())
    assert abs(total - expected) < 1e-4 * count**0.5 + 1e-5 * abs(expected)


def test_blocks_are_those_of_the_formats(llama: Path, tmp_path: Path) -> None:
    """Codes of the permuted matrix, dequantized by the other package, bit for bit."""
    _run(llama, tmp_path / "out", "gguf:q4_k_m")
    found, types = _tensors(_file(tmp_path / "out")), _types(_file(tmp_path / "out"))
    with Checkpoint.open(llama) as checkpoint:
        query = checkpoint.read("model.layers.1.self_attn.q_proj.weight")
        value = checkpoint.read("model.layers.0.self_attn.v_proj.weight")
        down = checkpoint.read("model.layers.0.mlp.down_proj.weight")
        norm = checkpoint.read("model.layers.0.input_layernorm.weight")
    for name, weight in (
        ("blk.1.attn_q.weight", query[RotaryPairs(4).indices(len(query))]),
        ("blk.0.attn_v.weight", value),
        ("blk.0.ffn_down.weight", down),
    ):
        fmt = GGUF_FORMATS[types[name]]
        wanted = fmt.dequantize(fmt.quantize(weight))
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7, msg=name)
    assert types["blk.1.attn_q.weight"] == "q4_k"
    assert types["blk.0.ffn_down.weight"] == "q5_0", "rows of 320 are no multiple of 256"
    assert types["output.weight"] == "q6_k"
    assert types["token_embd.weight"] == "q4_k"
    assert torch.equal(found["blk.0.attn_norm.weight"], norm)


def _plain_layers(model: Path) -> dict[str, torch.Tensor]:
    with Checkpoint.open(model) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names if "proj" in name}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_nvfp4_has_a_number_beside_each_matrix(family: str, tmp_path: Path) -> None:
    """Blocks as the `gguf` package reads them, times it, are the rounded weights; so are they as a source."""
    sizes = {"intermediate_size": 128, **({} if family == "llama" else {"moe_intermediate_size": 64})}
    model = save_small_model(family, tmp_path / "m", **sizes)
    _run(model, tmp_path / "out", "gguf:nvfp4")
    file, fmt = _file(tmp_path / "out"), GGUF_FORMATS["nvfp4"]
    stored, found = _tensors(file), dict(gguf_weights(model, file))
    assert _types(file)["blk.0.attn_q.weight"] == "nvfp4"
    experts = [name for name in stored if name.endswith("_exps.scale")]
    assert [stored[name].shape for name in experts] == [(4,)] * len(experts)
    assert len(experts) == (6 if "moe" in family else 0)
    for name, weight in _plain_layers(model).items():
        w = weight.float()
        error = (found[name] - w).square().mean() / w.square().mean()
        assert 0 < error < 0.02, name
    q = fmt.quantize(_plain_layers(model)["model.layers.0.self_attn.o_proj.weight"].float())
    torch.testing.assert_close(
        found["model.layers.0.self_attn.o_proj.weight"], fmt.dequantize(q), rtol=1e-6, atol=0
    )
    with open_gguf(file, dtype=torch.float32) as source:
        for name in _plain_layers(model):
            torch.testing.assert_close(source.read_tensor(name), found[name], rtol=1e-6, atol=0, msg=name)


def test_nvfp4_is_for_architectures_that_multiply_by_its_numbers(tmp_path: Path) -> None:
    model = save_small_model("qwen2", tmp_path / "m")
    with pytest.raises(UnsupportedError, match=r"leaves out the numbers.*qwen2"):
        _run(model, tmp_path / "out", "gguf:nvfp4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "form",
    ["gguf:q4_0", "gguf:q5_1", "gguf:q8_0", "gguf:q2_k_s", "gguf:q3_k_l", "gguf:q6_k", "gguf:mxfp4"],
)
def test_other_types(form: str, llama: Path, tmp_path: Path) -> None:
    result = _run(llama, tmp_path / "out", form)
    assert result.report["verified"][form]["reader"] == "gguf"


def test_experts_are_stacked(tmp_path: Path) -> None:
    model = save_small_model("qwen3_moe", tmp_path / "m")
    _run(model, tmp_path / "out", "gguf:q8_0")
    found = _tensors(_file(tmp_path / "out"))["blk.1.ffn_up_exps.weight"]
    fmt = GGUF_FORMATS["q8_0"]
    with Checkpoint.open(model) as checkpoint:
        for i in range(4):
            weight = checkpoint.read(f"model.layers.1.mlp.experts.{i}.up_proj.weight")
            torch.testing.assert_close(found[i], fmt.dequantize(fmt.quantize(weight)))


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = save_small_model("qwen2", tmp_path / "m", hidden_size=256, tie_word_embeddings=True)
    _run(model, tmp_path / "out", "gguf:q4_k_m")
    types = _types(_file(tmp_path / "out"))
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "q6_k"


def test_scheme_alone_is_enough(llama: Path, tmp_path: Path) -> None:
    _run(llama, tmp_path / "out", "auto_round", scheme="GGUF:Q8_0")
    assert set(_types(_file(tmp_path / "out")).values()) == {"q8_0", "f32"}


def test_layer_config_wins(llama: Path, tmp_path: Path) -> None:
    rules = {"v_proj": "GGUF:Q8_0", "layers.0.mlp.up_proj": {"bits": 6}, "embed_tokens": "GGUF:Q5_K"}
    _run(llama, tmp_path / "out", "gguf:q4_k_s", layer_config=rules, ignore_layers="o_proj")
    path = _file(tmp_path / "out")
    assert re.fullmatch(r"tiny-llama-Q\w+-\d\.\d\dbpw\.gguf", path.name), "no longer Q4_K_S"
    types = _types(path)
    assert types["blk.0.attn_v.weight"] == types["blk.1.attn_v.weight"] == "q8_0"
    assert types["blk.0.ffn_up.weight"] == "q6_k"
    assert types["token_embd.weight"] == "q5_k"
    assert types["blk.0.attn_output.weight"] == "f32", "kept as it is in the source"
    assert types["blk.1.ffn_up.weight"] == "q4_k"


def test_killed_run_continues_with_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    _run(llama, tmp_path / "whole", "gguf:q4_k_m")

    class Killed(Exception):  # noqa: N818
        pass

    def die(event: Any) -> None:
        if event.stage == "tune":
            raise Killed

    with pytest.raises(Killed):
        _run(llama, tmp_path / "out", "gguf:q4_k_m", die)
    assert not (tmp_path / "out").exists()
    _run(llama, tmp_path / "out", "gguf:q4_k_m")
    assert _file(tmp_path / "out").read_bytes() == _file(tmp_path / "whole").read_bytes()


def test_damaged_tensor_is_noticed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row order that is forgotten passes every checksum, and not the comparison with the source."""
    monkeypatch.setattr(RotaryPairs, "indices", lambda self, rows: torch.arange(rows))
    out = tmp_path / "out"
    _run(llama, out, "gguf:q8_0")  # consistent with itself
    monkeypatch.undo()
    from auto_round.export.gguf import verify

    good = _tensors(_file(out))["blk.0.attn_q.weight"]
    with Checkpoint.open(llama) as checkpoint:
        query = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    wanted = query[RotaryPairs(4).indices(len(query))]
    error = (good - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error > verify.LARGEST_ERROR["q8_0"]


def test_template_gives_the_same_file(tmp_path: Path) -> None:
    """A file of ours as template: rows are found by their values, also those of stacked experts."""
    model = save_small_model("mixtral", tmp_path / "m", hidden_size=256)
    _run(model, tmp_path / "f32", "gguf:f16")
    template = str(_file(tmp_path / "f32"))
    _run(model, tmp_path / "table", "gguf:q4_k_m")
    _run(model, tmp_path / "template", "gguf:q4_k_m", gguf_template=template)
    first, second = _tensors(_file(tmp_path / "table")), _tensors(_file(tmp_path / "template"))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_template_needs_no_table(tmp_path: Path) -> None:
    """An architecture without a row, with fused and renamed tensors, from a file of somebody else."""
    from auto_round.testing.tiny_models import tiny_config, tiny_model

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model(tiny_config("glm4", **sizes, head_dim=16)).save_pretrained(tmp_path / "m")
    byte_level_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="gguf_template"):
        _run(tmp_path / "m", tmp_path / "out", "gguf:q8_0")
    path = tmp_path / "template.gguf"
    writer = gguf.GGUFWriter(path, "somebody")
    writer.add_block_count(2)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.names}
    query = [weights.pop(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qkv"]
    writer.add_tensor("fused.weight", torch.cat(query).half().numpy())
    gate, up = weights.pop("model.layers.0.mlp.gate_up_proj.weight").chunk(2)
    writer.add_tensor("up.weight", up.half().flip(0).contiguous().numpy())
    writer.add_tensor("gate.weight", gate.half().numpy())
    for name, weight in weights.items():
        writer.add_tensor(name, weight.half().numpy() if weight.dim() > 1 else weight.float().numpy())
    writer.add_tensor("constant", torch.arange(7.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _run(tmp_path / "m", tmp_path / "out", "gguf:q8_0", gguf_template=str(path))
    found, fmt = _tensors(_file(tmp_path / "out")), GGUF_FORMATS["q8_0"]
    torch.testing.assert_close(found["fused.weight"], fmt.dequantize(fmt.quantize(torch.cat(query))))
    torch.testing.assert_close(found["up.weight"], fmt.dequantize(fmt.quantize(up.flip(0))))
    assert torch.equal(found["constant"], torch.arange(7.0))


def test_template_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    other = save_small_model("llama", tmp_path / "other", num_hidden_layers=1)
    _run(other, tmp_path / "f16", "gguf:f16")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        _run(llama, tmp_path / "out", "gguf:q8_0", gguf_template=str(_file(tmp_path / "f16")))
    _run(other, tmp_path / "q8", "gguf:q8_0")
    with pytest.raises(ConfigError, match="outtype f16"):
        _run(other, tmp_path / "out", "gguf:q8_0", gguf_template=str(_file(tmp_path / "q8")))


def test_imatrix_steers_the_rounding(llama: Path, tmp_path: Path) -> None:
    from auto_round.export.gguf.imatrix import Importances, write_imatrix

    rows = torch.ones(1, 256)
    rows[:, :128] = 1e4
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, Importances({"blk.0.attn_v.weight": rows}, {"blk.0.attn_v.weight": torch.ones(1)}))
    _run(llama, tmp_path / "plain", "gguf:q2_k")
    _run(llama, tmp_path / "steered", "gguf:q2_k", imatrix=str(path), disable_opt_rtn=False)
    with Checkpoint.open(llama) as checkpoint:
        value = checkpoint.read("model.layers.0.self_attn.v_proj.weight")
    errors = []
    for folder in ("plain", "steered"):
        error = (_tensors(_file(tmp_path / folder))["blk.0.attn_v.weight"] - value).square()
        errors.append(float(error[:, :128].sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "gguf:q4_k_x"}, "gguf:q4_k_"),
        ({"format": "gguf:q4_k_m,auto_round"}, "plan of its own"),
        ({"format": "gguf:q4_k_m,gguf:q8_0"}, "plan of its own"),
        ({"format": "gguf:q4_k_m", "scheme": "GGUF:Q8_0"}, "different mixtures"),
        ({"format": "gguf:q4_k_m", "scheme": "INT8"}, "no type of a GGUF file holds"),
        ({"scheme": "GGUF:Q4_K_M", "format": "auto_round", "bits": 3}, "layer_config"),
        ({"format": "gguf:q4_k_m", "layer_config": {"v_proj": "W8A16"}}, "no GGUF type"),
        ({"format": "gguf:q4_k_m", "layer_config": {"v_proj": "GGUF:Q3_K_M"}}, "mixture"),
        ({"format": "gguf"}, "needs a type"),
        ({"format": "auto_gptq", "scheme": "GGUF:Q4_0"}, "leave out the format"),
        ({"format": "auto_round", "imatrix": "x.dat"}, "belongs to GGUF"),
        ({"format": "gguf:q4_k_m", "imatrix": "x.dat", "iters": 10}, "iters 0"),
        ({"format": "auto_round", "save_imatrix": "x.gguf"}, "belongs to GGUF"),
        ({"format": "gguf:q4_k_m", "save_imatrix": "x.gguf", "imatrix": "x.dat"}, "measures nothing"),
        ({"format": "gguf:q4_k_m", "save_imatrix": "x.gguf"}, "rounds plainly"),
        ({"format": "gguf:q8_0", "save_imatrix": "x.gguf", "disable_opt_rtn": None}, "rounds plainly"),
        ({"format": "gguf:f16", "save_imatrix": "x.gguf", "iters": 10}, "rounds plainly"),
    ],
)
def test_requests_that_make_no_sense(
    given: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    form = given.pop("format")
    with pytest.raises(ConfigError, match=message):
        _run(llama, tmp_path / "out", form, **given)
    assert not any(tmp_path.iterdir())


def test_unknown_tokenizer_is_refused_before_work(tmp_path: Path) -> None:
    from auto_round.testing.tiny_models import save_tiny_model

    model = save_tiny_model("llama", tmp_path / "m")
    with pytest.raises(UnsupportedError, match="WordLevel"):
        _run(model, tmp_path / "out", "gguf:q8_0")


@pytest.mark.parametrize(("tied", "iters"), [(False, 0), (True, 2)])
def test_perplexity_is_that_of_the_file(tied: bool, iters: int, tmp_path: Path) -> None:
    """What the report says of held-out rows is what Transformers computes with the file's weights."""
    row = torch.randint(3, 250, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    model = save_small_model("llama", tmp_path / "m", hidden_size=256, tie_word_embeddings=tied)
    given = {"iters": iters, "nsamples": 3, "seqlen": 24, "batch_size": 1, "device_map": "cpu", "amp": False}
    options = {"model": str(model), "output_dir": str(tmp_path / "out"), "format": "gguf:q2_k_s", **given}
    report = run(build_options(options), dataset=[row] * 8).report
    file = _file(tmp_path / "out")
    loaded = reread(model, file)
    ids = torch.tensor([row])
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits[0, :-1].log_softmax(-1)
    wanted = float((-logits.gather(-1, ids[0, 1:, None]).mean()).exp())
    assert report["held_out"]["perplexity_after"] == pytest.approx(wanted, rel=2e-3)
    assert abs(report["held_out"]["perplexity_before"] / wanted - 1) > 0.01, "two bits change something"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tuned", [True, False])
def test_plain_weights_beside_a_file_hold_its_embedding(tuned: bool, tied: bool, tmp_path: Path) -> None:
    """A run is one model: what its file rounds, the folder beside it has rounded too, also a tied head."""
    model = save_small_model("qwen2", tmp_path / "model", tie_word_embeddings=tied)
    options = {
        "model": str(model),
        "output_dir": str(tmp_path / "out"),
        "format": "fake,gguf:q4_0",
        "iters": int(tuned),
        "disable_opt_rtn": not tuned,
        "nsamples": 4,
        "seqlen": 16,
        "batch_size": 2,
        "device_map": "cpu",
    }
    rows = torch.randint(3, 250, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    result = run(build_options(options), dataset=rows if tuned else None)
    assert not tuned or result.report["verified"]["fake"]["kl"] < 1e-6
    beside, folder = sorted(result.folders, key=lambda path: path.name == "fake")
    with Checkpoint.open(folder) as checkpoint:
        stored = checkpoint.read("model.embed_tokens.weight")
        head = checkpoint.read("lm_head.weight")
    held = _tensors(_file(beside))
    assert torch.equal(stored, held["token_embd.weight"].to(stored.dtype))
    assert torch.equal(head, held.get("output.weight", held["token_embd.weight"]).to(head.dtype))
