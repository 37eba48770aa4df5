"""A folder and a GGUF file beside their original: figures equal those of an independent computation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.config import EvaluationOptions, FidelityOptions, ModelOptions
from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.evaluate import predictors
from auto_round.evaluate.fidelity import measure, plan_measurement
from export.gguf.reread import reread
from export.gguf.small_models import FAMILIES, save_small_model, sentencepiece_tokenizer
from pipeline.runs import quantize

WORDS = "the hat can be here, and there the hen ran. "
LENGTH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An original, it in three bits packed and unpacked, as a GGUF file, and a text."""
    root = tmp_path_factory.mktemp("fidelity")
    original = save_small_model("llama", root / "original")
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "verify": False}
    result = quantize(original, root / "quantized", bits=3, format="auto_round,fake", **plain)
    gguf = quantize(original, root / "gguf", format="gguf:q4_0", group_size=None, **plain)
    text = root / "text.txt"
    text.write_text(WORDS * 40)
    packed, fake = result.folders
    return SimpleNamespace(
        original=original,
        packed=packed,
        fake=fake,
        gguf=next(gguf.folders[0].glob("*.gguf")),
        text=text,
        cache=root / "cache",
        root=root,
    )


def run(made, model, *, evaluation=None, tokenizer=None, events=None, **given):
    options = {
        "original": str(made.original),
        "text": str(made.text),
        "tokens": 240,
        "seqlen": LENGTH,
        "cache_dir": str(made.cache),
        "noise_floor": "none",
    }
    plan = plan_measurement(
        ModelOptions(model=str(model), device_map="cpu", tokenizer=tokenizer),
        EvaluationOptions(**(evaluation or {})),
        FidelityOptions(**{**options, **given}),
    )
    return measure(plan, *([] if events is None else [events.append]))


def predictions(model, rows):
    with torch.inference_mode():
        return model(rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def wanted(made, candidate):
    """The main figures, in float64 from the loaded models."""
    tokenizer = AutoTokenizer.from_pretrained(made.original)
    ids = tokenizer(made.text.read_text(), add_special_tokens=False)["input_ids"][:240]
    rows = torch.tensor(ids).view(-1, LENGTH)
    p = predictions(AutoModelForCausalLM.from_pretrained(made.original, dtype=torch.float32), rows)
    q = predictions(candidate, rows)
    target = rows[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    return {
        "positions": kl.numel(),
        "perplexity_original": math.exp(-p.gather(-1, target).mean()),
        "perplexity": math.exp(-q.gather(-1, target).mean()),
        "kl": float(kl.mean()),
        "p99": float(kl.quantile(0.99)),
        "largest": float(kl.max()),
        "reverse": float((q.exp() * (q - p)).sum(-1).mean()),
        "same_top": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def main_figures(found):
    return {
        "positions": found["positions"],
        "perplexity_original": found["perplexity_original"]["value"],
        "perplexity": found["perplexity"]["value"],
        "kl": found["kl"]["mean"]["value"],
        "p99": found["kl"]["p99"]["value"],
        "largest": found["kl"]["largest"],
        "reverse": found["kl_reverse"]["mean"]["value"],
        "same_top": found["same_top"]["value"],
    }


def test_a_packed_folder_as_its_weights_say(made):
    found = run(made, made.packed)
    candidate = AutoModelForCausalLM.from_pretrained(made.fake, dtype=torch.float32)
    want = wanted(made, candidate)
    assert main_figures(found) == pytest.approx(want, rel=1e-3)
    assert found["perplexity_ratio"]["value"] == pytest.approx(
        want["perplexity"] / want["perplexity_original"], rel=1e-5
    )
    worst = found["worst"][0]
    assert worst["kl"] == found["kl"]["largest"]
    assert 1 <= worst["token"] < LENGTH
    rows = found["by_confidence"]
    assert sum(row["positions"] for row in rows) == found["positions"]
    total = sum(row["positions"] * row["kl"] for row in rows)
    assert total / found["positions"] == pytest.approx(found["kl"]["mean"]["value"])


def test_a_gguf_file_as_its_weights_say(made):
    found = main_figures(run(made, made.gguf))
    assert found["kl"] > 1e-5
    assert found == pytest.approx(wanted(made, reread(made.original, made.gguf)), rel=1e-3)
    assert main_figures(run(made, made.gguf.parent)) == found


def test_a_gguf_file_can_be_the_original(made):
    forward, back = run(made, made.gguf), run(made, made.original, original=str(made.gguf))
    assert back["kl"]["mean"]["value"] == pytest.approx(forward["kl_reverse"]["mean"]["value"], rel=1e-4)
    assert back["perplexity"]["value"] == pytest.approx(forward["perplexity_original"]["value"])


def test_rows_at_once_and_the_cache_change_nothing(made):
    first = run(made, made.packed, cache_size=0)
    events: list = []
    second = run(made, made.packed, events=events)
    third = run(made, made.packed)
    assert second == third
    assert main_figures(first) == pytest.approx(main_figures(second))
    batched = run(made, made.packed, evaluation={"eval_bs": 4})
    assert main_figures(batched) == pytest.approx(main_figures(first), rel=1e-3)
    assert [e.stage for e in events if e.done == e.total] == ["original", "compare"]


def test_a_small_cache_holds_some_rows(made, tmp_path):
    size = (LENGTH - 1) * 288 * 4
    given = {"cache_dir": str(tmp_path), "cache_size": 4 * size}
    found = run(made, made.packed, **given)
    stored = list(tmp_path.rglob("*.safetensors"))
    assert 1 <= len(stored) < 10
    assert main_figures(found) == pytest.approx(main_figures(run(made, made.packed)))


def test_the_original_is_not_loaded_when_its_logits_are_there(made, monkeypatch):
    run(made, made.packed)
    from auto_round.evaluate import fidelity

    opened = []
    true = fidelity.open_model
    monkeypatch.setattr(fidelity, "open_model", lambda s, how: opened.append(s.path) or true(s, how))
    run(made, made.packed)
    assert opened == [made.packed]


def test_the_first_predictions_of_rows_may_be_left_out(made):
    found = run(made, made.packed, skip=20)
    assert found["positions"] == 10 * 3
    assert all(21 <= place["token"] < LENGTH for place in found["worst"])


def test_a_token_before_each_row(made):
    found = run(made, made.packed, evaluation={"add_bos_token": True})
    assert found["positions"] == 10 * (LENGTH - 1)
    assert found["perplexity"]["value"] != run(made, made.packed)["perplexity"]["value"]


def test_noise_floor_is_the_original_in_another_dtype(made):
    found = run(made, made.packed, noise_floor="dtype")
    floor = found["noise_floor"]
    assert floor["dtype"] == "bfloat16"
    assert 0 < floor["kl"] < found["kl"]["mean"]["value"]
    found = run(made, made.packed, noise_floor="dtype", evaluation={"eval_model_dtype": "bf16"})
    assert found["dtype"] == "bfloat16"
    assert found["noise_floor"]["dtype"] == "float32"


def test_rounded_outputs_are_about_those_of_a_model_in_bfloat16(made):
    """Noise of the same size, and none left behind."""
    tokens = torch.arange(3, 43).view(2, 20)
    model = AutoModelForCausalLM.from_pretrained(made.original, dtype=torch.float32)
    exact = predictors.TransformersPredictor(model).logits(tokens)
    rounded = predictors.TransformersPredictor(model, torch.bfloat16).logits(tokens)
    real = predictors.TransformersPredictor(
        AutoModelForCausalLM.from_pretrained(made.original, dtype=torch.bfloat16)
    ).logits(tokens)
    ratio = (rounded - exact).norm() / (real.float() - exact).norm()
    assert 0.5 < ratio < 2
    assert torch.equal(predictors.TransformersPredictor(model).logits(tokens), exact)


def test_perplexity_alone(made):
    found = run(made, made.packed, original=None)
    assert "kl" not in found
    assert found["perplexity"]["value"] == pytest.approx(run(made, made.packed)["perplexity"]["value"])


def test_another_vocabulary_is_refused_before_work(made, tmp_path, monkeypatch):
    monkeypatch.setattr(predictors, "load_whole", None)
    wider = save_small_model("llama", tmp_path / "wider", vocab_size=400)
    with pytest.raises(ConfigError, match=r"vocabulary of 288 tokens and .* one of 400"):
        run(made, wider)
    other = save_small_model("llama", tmp_path / "other", tokenizer=sentencepiece_tokenizer())
    with pytest.raises(ConfigError, match="mean different tokens by"):
        run(made, other)
    with pytest.raises(ConfigError, match="mean different tokens by"):
        run(made, made.gguf, original=str(other))


def test_a_file_of_another_model_is_refused(made, tmp_path):
    other = save_small_model("llama", tmp_path / "other", intermediate_size=128)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        run(made, made.gguf, original=str(other))


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"text": None, "original": None}, ConfigError, "no text to measure on"),
        ({"text": "no.txt"}, ConfigError, "no such file"),
        ({"original": None, "max_kl": 0.1}, ConfigError, "name --original and --text"),
        ({"skip": 23}, ConfigError, "leaves no prediction"),
        ({"original": "./no-such"}, ConfigError, "no folder"),
        ({"original": "no-such.gguf"}, ConfigError, "no file"),
    ],
)
def test_wrong_requests(made, given, kind, words):
    with pytest.raises(kind, match=words):
        run(made, made.packed, **given)


def test_wrong_files(made, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"what")
    with pytest.raises(ConfigError, match="no GGUF file"):
        run(made, tmp_path / "a.gguf")
    (tmp_path / "a-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match="one of 00002 files"):
        run(made, tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(ConfigError, match="2 GGUF files: name one"):
        run(made, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither config\.json nor a GGUF file"):
        run(made, tmp_path / "empty")


def test_llama_cpp_is_named_when_it_is_missing(made, monkeypatch):
    from auto_round.evaluate import llama_cpp

    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install llama-cpp-python"):
        run(made, made.gguf, gguf_engine="llama_cpp")


def test_nan_is_an_error(made, tmp_path):
    from safetensors.torch import load_file, save_file

    from auto_round.errors import NumericsError

    folder = save_small_model("llama", tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match="NaN or infinite"):
        run(made, folder)


def test_two_gguf_files_in_the_model_of_a_folder(made, tmp_path):
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "verify": False}
    finer = quantize(made.original, tmp_path, format="gguf:q8_0", group_size=None, **plain).folders[0]
    source = {"gguf_source": str(made.original)}
    found = run(made, made.gguf, original=str(finer), evaluation=source)
    beside = run(made, made.gguf)
    assert found["perplexity"]["value"] == pytest.approx(beside["perplexity"]["value"])
    with pytest.raises(ConfigError, match="name the folder that it was made from"):
        run(made, made.gguf, original=str(finer), evaluation={"gguf_source": str(finer)})


def test_a_packed_folder_lends_its_model_to_a_gguf_file(made):
    found = run(made, made.packed, original=str(made.gguf))
    assert found["perplexity_original"]["value"] == pytest.approx(
        run(made, made.gguf)["perplexity"]["value"], rel=1e-5
    )


def test_rows_are_no_longer_than_the_models_take(made):
    found = run(made, made.packed, seqlen=512)
    assert found["row_tokens"] == 64
    assert (
        run(made, made.gguf, original=None, seqlen=512, evaluation={"gguf_source": str(made.original)})[
            "row_tokens"
        ]
        == 64
    )
    with pytest.raises(ConfigError, match="leaves no prediction of a row of 64"):
        run(made, made.packed, seqlen=512, skip=100)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_files_of_every_family(family, tmp_path):
    original = save_small_model(family, tmp_path / "original")
    plain = {"iters": 0, "disable_opt_rtn": True, "dataset": None, "verify": False}
    folder = quantize(original, tmp_path / "gguf", format="gguf:q8_0", group_size=None, **plain).folders[0]
    (tmp_path / "text.txt").write_text(WORDS * 20)
    place = SimpleNamespace(original=original, text=tmp_path / "text.txt", cache=tmp_path / "cache")
    assert run(place, folder)["kl"]["mean"]["value"] < 5e-3
