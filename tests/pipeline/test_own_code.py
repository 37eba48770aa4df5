"""Models with code of their own go the same way as Transformers' families, once their code is trusted."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file

from auto_round.cli import main as cli
from auto_round.errors import ConfigError
from auto_round.models.auto_classes import load_model
from pipeline.own_code import save_own, seeing_rows
from pipeline.runs import quantize, token_rows, weights

TRUST = {"trust_remote_code": True}
pytestmark = pytest.mark.usefixtures("copied_code")


@pytest.mark.parametrize("name", ["own_text", "own_seeing"])
def test_code_that_is_not_trusted_does_not_run(tmp_path, name):
    model = save_own(name, tmp_path / "model")
    (model / f"{name}.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match="to run the code in that folder, pass trust_remote_code"):
        quantize(model, tmp_path / "out")
    assert cli.main(["inspect", str(model)]) == 2
    assert not (tmp_path / "out").exists()


def test_a_text_model(tmp_path, caplog, capsys):
    model, out = save_own("own_text", tmp_path / "model"), tmp_path / "out"
    caplog.set_level(logging.INFO, "auto_round")
    result = quantize(model, out, dataset=token_rows(6, 24), seqlen=24, nsamples=4, **TRUST)
    assert len(result.plan.quantized) == 2 * (2 + 2 * 4)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    assert result.report["verified"]["auto_round"]["sample"]
    assert 'models of type "own_text" (OwnForCausalLM) are not among those that were tried' in caplog.text
    for file in ("own_text.py", "own_seeing.py"):
        assert (out / file).read_bytes() == (model / file).read_bytes()
    again = load_model(out, trust_remote_code=True, dtype=torch.float32)
    assert again(torch.arange(5)[None]).logits.shape == (1, 5, 128)
    assert cli.main(["inspect", "--trust_remote_code", str(model)]) == 0
    said = capsys.readouterr().out
    assert "router     trunk.blocks.{0-1}.mixture.gate" in said
    assert "expert     trunk.blocks.{0-1}.mixture.experts.{0-3}.wide" in said


@pytest.mark.parametrize("towers", [False, True])
def test_a_model_that_reads_images(tmp_path, towers):
    model, out = save_own("own_seeing", tmp_path / "model"), tmp_path / "out"
    rows = [*seeing_rows(), *token_rows(6, 24)]
    given = TRUST | {"dataset": rows, "seqlen": 24, "nsamples": 8, "quant_nontext_module": towers}
    result = quantize(model, out, **given)
    assert len(result.plan.quantized) == 20 + 4 * towers
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    before, after = load_file(model / "model.safetensors"), weights(out)
    kept = [name for name in before if "vision_tower.first" in name or "bridge" in name]
    assert len(kept) == 4
    assert all(after[name].equal(before[name]) for name in kept)
