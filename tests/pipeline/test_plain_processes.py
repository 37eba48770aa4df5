"""Plain rounding by ranks of which only the first prepares the run."""

from __future__ import annotations

import pytest

from auto_round.config import build_options
from auto_round.errors import AutoRoundError, ConfigError
from auto_round.log import ignore_progress
from auto_round.pipeline.deciding.job import Job
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine.clock import Clock
from auto_round.pipeline.plain_processes import follow, prepared
from auto_round.pipeline.plain_rounding import PlainRounding
from auto_round.pipeline.quantize import run_job
from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import ROWS, SHORT, SIZES, tree
from ranks.threads import together

PLAIN = {**SHORT, "iters": 0, "disable_opt_rtn": True, "verify": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("qwen3", tmp_path_factory.mktemp("model"), **SIZES, head_dim=16)


def options(model, out, **given):
    return build_options({**PLAIN, "model": str(model), "output_dir": str(out), **given})


def outcome(wanted, ranks, dataset=None):
    """The run as this rank prepared it, or the error; and how often it prepared."""
    times = []

    def once(asked):
        times.append(asked)
        return prepare(asked, dataset=dataset)

    try:
        found = prepared(wanted, ranks, once)
    except AutoRoundError as error:
        found = error
    return found, len(times)


@pytest.mark.parametrize(
    "given",
    [{}, {"format": "auto_round,fake"}, {"scheme": "MXFP4", "format": "fake", "group_size": None}],
    ids=["one format", "two formats", "floats"],
)
def test_others_round_what_the_first_sends_and_prepare_nothing(model, tmp_path, given):
    run_job(prepare(options(model, tmp_path / "one", **given)), ignore_progress, Clock())

    def work(ranks):
        found, times = outcome(options(model, tmp_path / "three", **given), ranks)
        if isinstance(found, PlainRounding):
            follow(found, ranks)
        else:
            run_job(found, ignore_progress, Clock())
        return type(found), times

    assert together(3, work) == [(Job, 1), (PlainRounding, 0), (PlainRounding, 0)]
    assert tree(tmp_path / "three") == tree(tmp_path / "one")


def test_what_the_first_cannot_prepare_is_said_by_all(model, tmp_path):
    wanted = options(model, tmp_path / "out", layer_config={"no_such_layer": {"bits": 8}})
    (first, _), (second, _) = together(2, lambda ranks: outcome(wanted, ranks))
    assert isinstance(first, ConfigError)
    assert "no_such_layer" in str(first)
    assert str(second) == str(first)


def test_plain_rounding_that_wants_rows_after_all_is_prepared_by_all(model, tmp_path):
    wanted = options(model, tmp_path / "out", scheme="FP8_STATIC", group_size=None, format="fake")
    found = together(2, lambda ranks: outcome(wanted, ranks, ROWS))
    assert [(type(each), times) for each, times in found] == [(Job, 1), (Job, 1)]


def test_another_model_under_the_same_name_is_refused(model, tmp_path):
    other = save_tiny_model("qwen3", tmp_path / "other", seed=1, **SIZES, head_dim=16)

    def work(ranks):
        return outcome(options(other if ranks.rank else model, tmp_path / "out"), ranks)

    for found, _ in together(2, work):
        assert isinstance(found, ConfigError)
        assert "rank 1 has other model or machine than rank 0" in str(found)
    assert not (tmp_path / "out.partial").exists()
