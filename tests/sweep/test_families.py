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
    else:
        assert outcome.packed
        assert outcome.verified is not None
        assert (tmp_path / "out" / "config.json").is_file()
        if not outcome.unloaded:
            return
    other = advised(outcome)
    assert other is not None, outcome.refused or outcome.unloaded
    again = sweep(saved(family), family, *other, tmp_path / "again")
    assert not again.refused, again.refused
    assert again.packed
    assert not again.unloaded, again.unloaded


@pytest.mark.slow
@pytest.mark.parametrize("family", known_families())
def test_configurations_are_tiny(family):
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family_config(family))
    assert sum(p.numel() for p in model.parameters()) < LARGEST
