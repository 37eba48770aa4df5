"""`enable_alg_ext`: the last block is tuned by the model's predictions, the others as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.calibration.rows import load_rows
from auto_round.config import build_options
from auto_round.errors import ConfigError
from pipeline.runs import quantize, tree, weights

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2"])
def test_only_the_last_block_becomes_another(tiny, tmp_path, family):
    given = {"format": "fake", "bits": 2, "iters": 6}
    model = tiny(family, **({"head_dim": 16} if family == "gemma2" else {}))
    plain = weights(quantize(model, tmp_path / "plain", **given).folders[0])
    result = quantize(model, tmp_path / "extended", enable_alg_ext=True, **given)
    assert "the last one by the model's predictions" in result.report["method"]
    extended = weights(result.folders[0])
    changed = {name for name, weight in plain.items() if not torch.equal(weight, extended[name])}
    last = max(int(name.split(".")[2]) for name in result.plan.quantized)
    assert changed
    assert all(name.startswith(f"model.layers.{last}.") for name in changed)


def test_blocks_tuned_as_one_and_a_run_repeated(tiny, tmp_path):
    given = {"format": "auto_round", "nblocks": 2, "enable_alg_ext": True, "sym": False}
    first, second = (quantize(tiny("llama"), tmp_path / name, **given) for name in ("a", "b"))
    files = [
        {k: v for k, v in tree(r.folders[0]).items() if k.endswith(".safetensors")} for r in (first, second)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_tables_of_positions_are_not_left(tiny, tmp_path, family):
    """Positions of all rows are judged together, but no model is given more than it has positions."""
    changes = {"opt": {"max_position_embeddings": 20, "ffn_dim": 96, "word_embed_proj_dim": 64}}
    source = tiny(family, **changes.get(family, {"n_positions": 20, "n_embd": 64, "n_head": 4, "n_layer": 2}))
    result = quantize(source, tmp_path / "out", enable_alg_ext=True, batch_size=4)
    assert result.report["held_out"]["positions"] > 20


def test_rounding_without_tuning_has_nothing_to_extend():
    with pytest.raises(ConfigError, match="enable_alg_ext extends tuning"):
        build_options({"model": "m", "enable_alg_ext": True, "iters": 0})


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.is_dir(), reason="the examples are not part of this installation")
def test_a_trained_model_predicts_better_on_text_it_has_not_seen(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    found = load_rows("python-docs", tokenizer, seqlen=128, nsamples=88, seed=0).rows
    rows = [row.tokens.tolist() for row in found]
    given = {"dataset": rows[:40], "nsamples": 32, "seqlen": 128, "bits": 2, "group_size": 64, "iters": 100}
    unseen = torch.tensor(rows[40:])

    def log_probabilities(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(unseen).logits.log_softmax(-1)

    original = log_probabilities(DEMO)

    def divergence(**more):
        out = tmp_path / ("extended" if more else "plain")
        result = quantize(DEMO, out, format="fake", batch_size=8, not_use_best_mse=False, **given, **more)
        return (original.exp() * (original - log_probabilities(result.folders[0]))).sum(-1).mean().item()

    plain, extended = divergence(), divergence(enable_alg_ext=True)
    assert extended < 0.98 * plain
