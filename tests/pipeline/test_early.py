"""What can be known to be wrong is said before a model or data are fetched."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.models.hub import resolve_model
from auto_round.pipeline.deciding import fetch_rows, open_model
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine import device


@pytest.fixture(autouse=True)
def _nothing_is_fetched(monkeypatch):
    def fetch(*given, **named):
        pytest.fail("fetched")

    monkeypatch.setattr(open_model, "resolve_model", fetch)
    monkeypatch.setattr(fetch_rows, "load_rows", fetch)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheme": "W4A17"}, "W4A16"),
        ({"bits": 5, "data_type": "mx_fp", "group_size": 32}, "not there yet"),
        ({"scheme": "INT8", "act_dynamic": False}, "calibration"),
        ({"layer_config": {"q_proj": {"bit": 8}}}, 'layer_config "q_proj".*bits'),
        ({"layer_config": {"q_proj": "W4A17"}}, "W4A16"),
        ({"format": "auto_rond"}, "auto_round"),
        ({"format": "gguf:q9_k"}, "gguf"),
        ({"format": "auto_round,mlx"}, "mlx"),
        ({"lr": 1000}, "lr must be above 0 and below 10"),
        ({"lr": 0}, "lr must be above 0 and below 10"),
        ({"minmax_lr": 0}, "minmax_lr"),
        ({"momentum": 1}, "momentum"),
        ({"lr_scheduler": "cosine"}, "function of .step, iters."),
        ({"lr_scheduler": LinearLR}, "function of .step, iters.* PyTorch's schedulers"),
        ({"lr_scheduler": lambda step, iters: float("nan")}, "gives nan at step 0"),
        ({"device_map": "cuda:77"}, "cuda:77"),
        ({"dataset": ""}, 'option "dataset" cannot be'),
        ({"dataset": "pile-10k:foo=1"}, "foo"),
        ({"dataset": "pile-10k,no-such-file.jsonl"}, "no such file"),
        ({"dataset": "pile10k"}, "pile-10k"),
        (
            {"format": "gguf:q4_0", "iters": 0, "imatrix": "no-such.gguf"},
            "imatrix no-such.gguf: no such file",
        ),
        ({"format": "gguf:q4_0", "gguf_template": "no-such.gguf"}, "gguf_template no-such.gguf: no such"),
        ({"dataset": "audiocaps"}, "captions or sound"),
        ({"distill_steps": 2, "distill_lr": 5}, "distill_lr.*codes above 0 and below 1.*leave it out"),
        ({"distill_steps": 2, "distill_lr": float("inf")}, "distill_lr.*codes above 0"),
        (
            {"format": "gguf:q4_0", "iters": 0, "imatrix": __file__, "distill_steps": 2},
            "distill_steps needs data: leave one of them out",
        ),
        ({"device_map": "{a:cpu}"}, "unknown device.*from Python a mapping"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
@pytest.mark.parametrize("rows", [True, False], ids=["run", "dry run"])
def test_requests(given, said, rows):
    with pytest.raises((ConfigError, UnsupportedError), match=said):
        prepare(build_options({"model": "some/model", **given}), rows=rows)


def test_an_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rows\.jsonl: the file is empty"):
        prepare(build_options({"model": "some/model", "dataset": str(tmp_path / "rows.jsonl")}))


@pytest.mark.parametrize("where", ["file", "file/below", "file/far/below"])
def test_files_in_the_way_of_the_output(tmp_path, where):
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a folder"):
        prepare(build_options({"model": "some/model", "output_dir": str(tmp_path / where)}))


def test_outputs_that_hold_something_else_are_refused_before_rows_are_fetched(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(open_model, "resolve_model", resolve_model)
    (tmp_path / "thesis.txt").write_text("years of work")
    options = build_options({"model": str(tiny("llama")), "output_dir": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"already holds 1 files .*thesis.txt"):
        prepare(options)
    with pytest.raises(ConfigError, match=r"which is or holds what is read"):
        prepare(build_options({"model": str(tiny("llama")), "output_dir": str(tiny("llama"))}))


@pytest.mark.parametrize("where", ["out", "far/below/out"])
def test_folders_that_may_not_be_written(tmp_path, monkeypatch, where):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(ConfigError, match="no permission"):
        prepare(build_options({"model": "some/model", "output_dir": str(tmp_path / where)}))


@pytest.mark.parametrize(
    "given",
    [{"scheme": "BF16"}, {"bits": 16}, {"ignore_layers": "proj"}, {"layer_config": {"proj": "BF16"}}],
    ids=str,
)
def test_a_run_that_quantizes_nothing_needs_no_data(given, tiny, monkeypatch, tmp_path):
    """It fetched the data set, and tuned blocks in which nothing was rounded."""
    monkeypatch.undo()
    monkeypatch.setattr(fetch_rows, "load_rows", lambda *_, **__: pytest.fail("fetched"))
    job = prepare(build_options({"model": str(tiny("llama")), "output_dir": str(tmp_path / "o"), **given}))
    assert (job.tune.iters, job.rows, job.plan.quantized) == (0, None, ())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device_map": {"nowhere": "cpu"}}, 'device_map "nowhere" matches no layer'),
        ({"device_map": {"up_proj": "cpu", "": "meta:0"}, "distill_steps": 2}, "runs on one device"),
    ],
)
def test_places_that_cannot_be_are_refused_before_rows_are_fetched(tiny, monkeypatch, tmp_path, given, said):
    """With `--dataset self` the model wrote all rows first."""
    monkeypatch.setattr(open_model, "resolve_model", resolve_model)
    monkeypatch.setattr(device, "_device", torch.device)  # as if one more were there
    with pytest.raises(ConfigError, match=said):
        prepare(build_options({"model": str(tiny("llama")), "output_dir": str(tmp_path / "o"), **given}))


def test_a_tokenizer_on_a_hub_out_of_reach_is_refused_at_once(tiny, monkeypatch, tmp_path):
    """The hub's client asked it again and again, for half a minute."""
    monkeypatch.undo()
    monkeypatch.setattr(open_model, "is_reachable", lambda *_: False)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("retried"))
    given = {"model": str(tiny("llama")), "tokenizer": "some/tokenizer", "output_dir": str(tmp_path / "o")}
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer in some/tokenizer .*--tokenizer takes a folder"):
        prepare(build_options(given))


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tiny, monkeypatch, tmp_path):
    """Transformers makes one without a word, by which all text was dropped as empty."""
    monkeypatch.undo()
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny("qwen3"), folder, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    text.write_text("Once upon a time. " * 99)
    given = {"model": str(folder), "dataset": str(text), "output_dir": str(tmp_path / "o"), "seqlen": 8}
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer in .*vocabulary is empty.*--tokenizer"):
        prepare(build_options(given))


def test_a_format_that_holds_no_gguf_types_is_not_passed_over_in_silence(caplog, tiny, monkeypatch):
    from auto_round.export.table import settle_formats

    options = {"model": "m", "scheme": "GGUF:Q4_K_M"}
    assert settle_formats(build_options(options))[0].output.formats == ("gguf:q4_k_m",)
    assert not caplog.text
    settle_formats(build_options({**options, "format": "auto_round"}))
    assert "format auto_round holds no GGUF types" in caplog.text


@pytest.mark.parametrize(
    ("given", "plainly"), [({}, True), ({"iters": 1}, False), ({"dataset": "mbpp"}, False)]
)
def test_who_needs_data_for_searched_ranges_only_hears_what_needs_none(tiny, monkeypatch, given, plainly):
    def unreachable(*given, **named):
        raise ConfigError("the hub cannot be reached")

    monkeypatch.setattr(open_model, "resolve_model", resolve_model)
    monkeypatch.setattr(fetch_rows, "load_rows", unreachable)
    options = build_options({"model": str(tiny("llama")), "iters": 0, "group_size": 32, **given})
    with pytest.raises(ConfigError, match="the hub cannot be reached") as error:
        prepare(options)
    assert ("--disable_opt_rtn" in str(error.value)) is plainly
