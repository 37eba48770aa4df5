"""Models whose blocks hand on more than hidden states, from calibration rows to the folder."""

from __future__ import annotations

import pytest

from auto_round.autoscheme.runs import Given, choose_schemes
from auto_round.config import build_options
from auto_round.pipeline.quantize import run
from pipeline.runs import SHORT, Stop, quantize, stop_after, token_rows, tree
from sweep.configurations import known_families
from sweep.outcome import save_family

GIVEN = {
    "dataset": token_rows(20),
    "nsamples": 8,
    "seqlen": 16,
    "iters": 2,
    "group_size": 32,
    "amp": False,
}
WAYS = {
    "several states": ("deepseek_v4", {}),
    "keys and values": ("gemma4_text", {}),
    "states, keys and values": ("gemma3n_text", {"nblocks": 2}),
    "choices of tokens": ("glm_moe_dsa", {}),
    "inputs rounded": ("gemma4_text", {"scheme": "MXFP4", "group_size": None}),
    "all blocks together": ("gemma4_text", {"distill_steps": 2, "distill_nsamples": 2}),
    "all blocks together, choices": ("glm_moe_dsa", {"distill_steps": 2, "distill_nsamples": 2}),
}
"""What is handed on and how it is tuned -> family and options."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def of(family):
        if family not in known_families():
            pytest.skip("this Transformers has no such family")
        if family not in made:
            made[family] = save_family(family, tmp_path_factory.mktemp("model") / family)
        return made[family]

    return of


@pytest.mark.parametrize("way", WAYS)
def test_what_was_tuned_is_what_the_whole_model_predicts(folder, tmp_path, way):
    """The reloaded model runs all blocks together, as Transformers does."""
    family, given = WAYS[way]
    result = quantize(folder(family), tmp_path / "out", **{**GIVEN, **given})
    assert 0 < result.report["held_out"]["kl"] < 0.5
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6


@pytest.mark.parametrize("way", ["keys and values", "choices of tokens"])
def test_a_continued_run_gives_the_same_bytes(folder, tmp_path, way):
    model = folder(WAYS[way][0])
    quantize(model, tmp_path / "whole", **GIVEN)
    with pytest.raises(Stop):
        quantize(model, tmp_path / "out", progress=stop_after(2), **GIVEN)
    seen = []
    quantize(model, tmp_path / "out", progress=seen.append, **GIVEN)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert 0 < sum(event.stage == "tune" for event in seen) <= 2


MIXES = {
    "keys and values": ("gemma4_text", "fisher", "W2A16,W8A16"),
    "states, keys and values": ("gemma3n_text", "first_order", "W2A16,W8A16"),
    "choices of tokens": ("glm_moe_dsa", "fisher", "W2A16,W8A16"),
    "choices of tokens, inputs rounded": ("glm_moe_dsa", "first_order", "MXFP4,MXFP8"),
    "several states": ("deepseek_v4", "kl", "W2A16,W8A16"),
}
"""What is handed on -> family, how sensitivity is measured, schemes to choose from."""


@pytest.mark.parametrize("way", MIXES)
def test_a_mix_is_chosen(folder, tmp_path, monkeypatch, way):
    """Slopes flow back through what is handed on."""
    monkeypatch.setenv("AR_CACHE", str(tmp_path / "cache"))
    family, method, schemes = MIXES[way]
    mix = {"avg_bits": 6.0, "scheme_options": schemes, "score_method": method}
    mix |= {"score_nsamples": 3, "score_seqlen": 16}
    given = {**SHORT, **GIVEN, **mix, "group_size": None, "iters": 0, "disable_opt_rtn": True}
    rows = given.pop("dataset")
    asked = build_options({**given, "model": str(folder(family)), "output_dir": str(tmp_path / "out")})
    (options,) = choose_schemes(asked, given=Given(dataset=rows))
    result = run(options, dataset=rows)
    assert 5 < result.report["auto_scheme"]["average_bits"] <= 6
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    told = result.report["sensitivity"]["layers"]
    known = {layer["block"] for layer in told if any(score > 0 for score in layer["scores"].values())}
    assert known == {layer["block"] for layer in told}
    assert len(known) > 1
