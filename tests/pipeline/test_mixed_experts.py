"""Experts in one parameter with different schemes: refused before work, or rounded plainly."""

from __future__ import annotations

import pytest

from auto_round.errors import UnsupportedError
from pipeline.runs import quantize
from sweep.outcome import save_family

ONE = {"model.layers.1.mlp.experts.2.up_proj": {"bits": 8}}
REASON = (
    r"mlp\.experts\.gate_up_proj holds 8 matrices.* different schemes: .*experts\.0\.gate_proj one, "
    r".*experts\.2\.up_proj another"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("qwen3_moe", tmp_path_factory.mktemp("model") / "qwen3_moe")


@pytest.mark.parametrize("given", [{"iters": 1}, {"iters": 0}], ids=["tuned", "searched"])
@pytest.mark.parametrize("fmt", ["auto_round", pytest.param("fake", marks=pytest.mark.slow)])
def test_refused_before_work(model, tmp_path, fmt, given):
    with pytest.raises(UnsupportedError, match=REASON):
        quantize(model, tmp_path / "out", format=fmt, layer_config=ONE, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fmt", "said"), [("llm_compressor", "by one scheme"), ("auto_awq", "holds codes of 4 bits, not 8")]
)
def test_formats_that_cannot_hold_them_say_so(model, tmp_path, fmt, said):
    with pytest.raises(UnsupportedError, match=said):
        quantize(model, tmp_path / "out", format=fmt, layer_config=ONE)
    assert not list(tmp_path.iterdir())


def test_plain_rounding_takes_them_one_by_one(model, tmp_path, caplog):
    plain = {"iters": 0, "disable_opt_rtn": True, "layer_config": ONE}
    result = quantize(model, tmp_path / "out", dataset=None, **plain)
    assert result.report["verified"]["auto_round"] == {"tokens": 1}
    quantize(model, tmp_path / "measured", **plain)
    assert "plain rounding without a measurement on the data: matrices that the model holds" in caplog.text
