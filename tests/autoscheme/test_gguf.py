"""Types of GGUF files: the embedding takes part, experts alone are fused, rows have the types that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from transformers import AutoModelForCausalLM

from auto_round.autoscheme import by_divergence, by_gradients, scores
from auto_round.autoscheme.parts import Part
from auto_round.autoscheme.runs import Given, choose_schemes
from auto_round.config import Options, build_options
from auto_round.errors import ConfigError
from auto_round.pipeline.quantize import run
from auto_round.schemes.scheme import parse_scheme
from auto_round.tuning.weights import round_to_nearest
from export.gguf.small_models import save_small_model
from pipeline.runs import SHORT, token_rows

ROWS = [[t % 60 + 3 for t in row] for row in token_rows(5, 16)]
EMBEDDING = {"llama": "model.embed_tokens", "qwen2": "model.embed_tokens", "gpt2": "transformer.wte"}
UNTIED, TIED = "llama", "qwen2"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes folders of small models, once each."""
    made: dict[str, Path] = {}

    def make(family: str, **changes: Any) -> Path:
        key = f"{family}{changes}"
        if key not in made:
            made[key] = save_small_model(family, tmp_path_factory.mktemp("model") / family, **changes)
        return made[key]

    return make


def chosen(model: Path, out: Path, **given: Any) -> Options:
    wanted = {
        "iters": 0,
        "disable_opt_rtn": True,
        "score_nsamples": 5,
        "score_seqlen": 16,
        "group_size": None,
    }
    wanted |= {"format": "gguf:q4_0", "scheme_options": "GGUF:Q4_0,GGUF:Q5_0,GGUF:Q8_0"}
    options = build_options({**SHORT, "model": str(model), "output_dir": str(out / "out"), **wanted, **given})
    return choose_schemes(options, given=Given(dataset=ROWS))[0]


def plan_of(options: Options) -> dict[str, Any]:
    assert options.chosen is not None
    return dict(options.chosen["layer_config"])


def of(found: dict[Part, list[float]], name: str) -> list[float]:
    return next(row for part, row in found.items() if part.layers == (name,))


@pytest.mark.parametrize("family", EMBEDDING)
def test_a_size_is_met_and_the_embedding_has_the_chosen_type(
    model_of: Any, tmp_path: Path, family: str
) -> None:
    """The most that there is, and less."""
    size = 10_000_000
    for number in range(2):
        out = tmp_path / str(number)
        options = chosen(model_of(family), out, target_size=size)
        result = run(options, dataset=ROWS)
        file = next((out / "out").glob("*.gguf"))
        kind = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}["token_embd.weight"]
        assert plan_of(options)[EMBEDDING[family]] == f"GGUF:{kind}"
        reached = file.stat().st_size
        assert reached == result.report["bytes_after"]["gguf:q4_0"]
        assert 0.97 * size < reached <= size if number else kind == "Q8_0"
        size = int(0.85 * reached)


def test_a_mixture_by_choice_is_called_by_what_it_holds(model_of: Any, tmp_path: Path) -> None:
    """Not by the type that the format names, nor by that of the mixture's first layers."""
    options = chosen(model_of(UNTIED), tmp_path, avg_bits=5)
    result = run(options, dataset=ROWS)
    (file,) = (tmp_path / "out").glob("*.gguf")
    reader = GGUFReader(file)
    weights: dict[str, int] = {}
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] = weights.get(tensor.tensor_type.name, 0) + tensor.n_elements
    most = max(weights, key=weights.__getitem__)
    assert len(weights) > 2
    bits = 8 * sum(tensor.n_bytes for tensor in reader.tensors) / sum(weights.values())
    assert file.name == f"{UNTIED}-{most}-{bits:.2f}bpw.gguf"
    said = reader.fields["general.file_type"].contents()
    assert said == LlamaFileType[f"MOSTLY_{most}"]
    assert file.name in (tmp_path / "out" / "README.md").read_text()
    reasons = {line["reason"] for line in result.report["plan"] if line["bits"] < 16}
    assert reasons == {"AutoScheme"}


def test_bits_do_not_count_the_embedding_which_gets_the_largest(model_of: Any, tmp_path: Path) -> None:
    options = chosen(model_of(UNTIED), tmp_path, avg_bits=5)
    assert EMBEDDING[UNTIED] not in plan_of(options)
    assert (options.scheme.layer_config or {})[EMBEDDING[UNTIED]] == "GGUF:Q8_0"


@pytest.mark.parametrize("target", [{"avg_bits": 5}, {"target_size": "10MB"}])
def test_the_users_rule_for_the_embedding_stays(
    model_of: Any, tmp_path: Path, target: dict[str, Any]
) -> None:
    options = chosen(model_of(UNTIED), tmp_path, layer_config={"embed_tokens": "GGUF:Q4_0"}, **target)
    run(options, dataset=ROWS)
    found = {t.name: t.tensor_type.name for t in GGUFReader(next((tmp_path / "out").glob("*.gguf"))).tensors}
    assert found["token_embd.weight"] == "Q4_0"


@pytest.mark.parametrize("family", [UNTIED, TIED])
def test_what_rounding_the_embedding_loses(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, family: str
) -> None:
    """Measured: the divergence of the model with this embedding; estimated: near it."""
    model, name = model_of(family), EMBEDDING[family]
    for method in ("kl", "fisher"):
        monkeypatch.setenv("AR_CACHE", str(tmp_path / method))
        chosen(model, tmp_path, target_size="10MB", score_method=method)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        before = original(torch.tensor(ROWS)).logits.log_softmax(-1)
    for option, kind in enumerate(("GGUF:Q4_0", "GGUF:Q5_0", "GGUF:Q8_0")):
        fmt = parse_scheme(kind).weight_format()
        assert fmt is not None
        weight = original.get_parameter(f"{name}.weight").detach()
        rounded.get_parameter(f"{name}.weight").data = fmt.dequantize(
            round_to_nearest(weight, fmt, None, None)
        )
        with torch.no_grad():
            after = rounded(torch.tensor(ROWS)).logits.log_softmax(-1)
        lost = float((before.exp() * (before - after)).sum(-1).mean())
        assert of(seen[0], name)[option] == pytest.approx(lost, rel=1e-2)
        assert 0.5 * lost < of(seen[1], name)[option] < 2 * lost


@pytest.mark.parametrize("method", ["kl", "fisher"])
def test_scores_depend_neither_on_batch_and_memory_nor_on_a_kill(
    model_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Any, method: str
) -> None:
    def measure(cache: str, **given: Any) -> None:
        monkeypatch.setenv("AR_CACHE", str(tmp_path / cache))
        chosen(model_of(TIED), tmp_path, target_size="10MB", score_method=method, **given)

    class Killed(BaseException):
        pass

    def dies(*args: Any) -> Any:
        found = list(whole(*args))
        yield from found[:-1]
        raise Killed

    whole = scores.METHODS[method]
    measure("a")
    monkeypatch.setattr(by_divergence, "STREAM_BYTES", 0)
    monkeypatch.setattr(by_gradients, "CHANGES_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(scores, "METHODS", {method: dies})
        with pytest.raises(Killed):
            measure("b", score_batch_size=2)
    measure("b", score_batch_size=2)
    for part, row in seen[0].items():
        assert seen[-1][part] == pytest.approx(row, rel=2e-3)


def test_q_k_v_are_chosen_for_apart_and_experts_of_a_kind_together(
    model_of: Any, tmp_path: Path, seen: Any
) -> None:
    chosen(model_of("qwen3_moe"), tmp_path, avg_bits=6)
    parts = [{name.split("layers.0.")[-1] for name in part.layers} for part in seen[0] if part.block == 0]
    assert {"self_attn.q_proj"} in parts
    assert {"self_attn.v_proj"} in parts
    experts = [names for names in parts if any("experts" in name for name in names)]
    kinds = [{name.rpartition(".")[2] for name in names} for names in experts]
    assert kinds == [{"gate_proj", "up_proj"}, {"down_proj"}], "of one tensor of the model, and another"
    assert all(len({name.rpartition(".")[0] for name in names}) > 1 for names in experts)


def test_rows_that_a_type_does_not_divide_count_as_what_they_get(model_of: Any, tmp_path: Path) -> None:
    """Blocks of 256 weights do not fit rows of 64 and 96: such layers get types with blocks of 32."""
    given = {"format": "gguf:q4_k_s", "scheme_options": "GGUF:Q4_K_S,GGUF:Q6_K"}
    options = chosen(model_of(UNTIED), tmp_path, target_size=100_000, **given)
    assert set(plan_of(options).values()) == {"GGUF:Q5_0", "GGUF:Q8_0"}
    run(options, dataset=ROWS)
    assert 97_000 < next((tmp_path / "out").glob("*.gguf")).stat().st_size <= 100_000


def test_a_budget_out_of_reach_since_rows_do_not_fit_says_so(model_of: Any, tmp_path: Path) -> None:
    given = {"format": "gguf:q4_k_s", "scheme_options": "GGUF:Q4_K_S,GGUF:Q6_K", "avg_bits": 5}
    with pytest.raises(ConfigError, match=r"(\d+) of \1 layers have rows that are no multiple of 256, and"):
        chosen(model_of(UNTIED), tmp_path, **given)
    given |= {"format": "gguf:q4_0", "scheme_options": "GGUF:Q4_0,GGUF:Q5_0", "avg_bits": 4}
    with pytest.raises(ConfigError, match=r"bits per weight(, of which [\d.]+ are fixed)?; give a larger"):
        chosen(model_of(UNTIED), tmp_path, **given)
