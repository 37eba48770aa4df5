"""Every causal family of Transformers in four formats, tuned and plainly rounded: no crash, all loads."""

from __future__ import annotations

import pytest

from sweep.configurations import LARGEST, family_config, known_families
from sweep.outcome import FORMATS, METHODS, advised, save_family, sweep


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made.clear()
            made[family] = save_family(family, tmp_path_factory.mktemp("model") / family)
        return made[family]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", known_families())
def test_passes_or_is_refused_with_advice_that_works(saved, tmp_path, family, method, fmt):
    outcome = sweep(saved(family), family, fmt, method, tmp_path / "out")
    if outcome.refused:
        assert not list(tmp_path.iterdir()), "it was refused after work had begun"
        outcome = as_advised(saved(family), outcome, tmp_path / "advised")
    assert list(tmp_path.glob("*/config.json"))
    if outcome.unloaded:  # written for others to load
        outcome = as_advised(saved(family), outcome, tmp_path / "loaded")
    assert outcome.packed
    assert outcome.verified is not None
    assert not outcome.unloaded, outcome.unloaded


def as_advised(folder, outcome, out):
    other = advised(outcome)
    assert other is not None, outcome.refused or outcome.unloaded
    found = sweep(folder, outcome.family, *other, out)
    assert not found.refused, found.refused
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", known_families())
def test_configurations_are_tiny(family):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(family))
    assert sum(p.numel() for p in model.parameters()) < LARGEST
