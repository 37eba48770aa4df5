"""Every option acts, or a warning says that it does not and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from auto_round.config import all_settings, build_options
from auto_round.errors import ConfigError
from auto_round.export.table import EXPORTERS, settle_formats
from auto_round.log import logger
from auto_round.pipeline.deciding.idle_options import IDLE
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.separate_runs import runs_of
from auto_round.schemes.scheme import QuantizationScheme
from export.gguf.small_models import byte_level_tokenizer
from pipeline.runs import quantize, token_rows, tree, weights


@dataclass(frozen=True)
class Change:
    """Another value of an option, and what else both runs are told."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


PLAIN = {"iters": 0, "disable_opt_rtn": True}
CACHE = {"format": "llm_compressor", **PLAIN}
INT8 = {"scheme": "INT8", "group_size": None, "format": "fake", **PLAIN}

ACTS = {
    "model_dtype": Change("float32", PLAIN),
    "scheme": Change("W8A16", PLAIN),
    "layer_config": Change({"k_proj": {"bits": 8}}, PLAIN),
    "bits": Change(8, PLAIN),
    "group_size": Change(16, PLAIN),
    "sym": Change(False, PLAIN),
    "act_bits": Change(4, {**INT8, "iters": 2}),
    "act_sym": Change(False, {**INT8, "iters": 2}),
    "act_percentile": Change(
        50.0, {"scheme": "FP8_STATIC", "group_size": None, "format": "fake", "iters": 2}
    ),
    "scale_dtype": Change("float32", PLAIN),
    "ignore_layers": Change(("k_proj",), PLAIN),
    "quant_lm_head": Change(True, PLAIN),
    "to_quant_block_names": Change(("model.layers.1",), PLAIN),
    "static_kv_dtype": Change("fp8", CACHE),
    "static_attention_dtype": Change("fp8", CACHE),
    "static_kv_granularity": Change("head", {"static_kv_dtype": "fp8", **CACHE}),
    "static_attention_granularity": Change("head", {"static_attention_dtype": "fp8", **CACHE}),
    "nsamples": Change(3),
    "seqlen": Change(8),
    "seed": Change(7),
    "iters": Change(3),
    "batch_size": Change(1),
    "gradient_accumulate_steps": Change(3),
    "lr": Change(0.1),
    "minmax_lr": Change(0.5),
    "lr_scheduler": Change(lambda step, iters: 0.1),
    "momentum": Change(0.9, {"iters": 8}),
    "nblocks": Change(2),
    "enable_adam": Change(True),
    "enable_minmax_tuning": Change(False),
    "enable_norm_bias_tuning": Change(True),
    "enable_quanted_input": Change(False),
    "not_use_best_mse": Change(False, {"lr": 5.0}),
    "dynamic_max_gap": Change(1, {"iters": 40, "lr": 5.0, "not_use_best_mse": False}),
    "amp": Change(False),
    "disable_opt_rtn": Change(True, {"iters": 0}),
    "smooth": Change(0.5),
    "enable_alg_ext": Change(True, {"iters": 4}),
    "distill_steps": Change(2, {"distill_nsamples": 4}),
    "distill_nsamples": Change(3, {"distill_steps": 2, "dataset": token_rows(134)}),
    "distill_scales_only": Change(True, {"distill_steps": 2, "distill_nsamples": 4}),
    "distill_lr": Change(0.05, {"distill_steps": 2, "distill_nsamples": 4}),
    "format": Change("fake", PLAIN),
    "max_shard_size": Change("32KB", PLAIN),
    "verify": Change(False, PLAIN),
}
"""Options by whose other value the written folder changes."""

DIFFUSION = {
    "components": "transformer",
    "num_inference_steps": 3,
    "steps_per_caption": 2,
    "guidance_scale": 2.0,
    "generator_seed": 3,
    "pipeline_args": {"height": 16},
    "prompt": "a cat",
    "prompt_file": "captions.tsv",
    "metrics": "clip",
    "image_save_dir": ".",
}
"""Options of pipelines, which say nothing for a model."""

SHOWN_ELSEWHERE = {
    **dict.fromkeys(DIFFUSION, "tests/diffusion/test_run.py"),
    "model": "every test",
    "tokenizer": "tests/pipeline/test_end_to_end.py; where nothing is tokenized a warning",
    "platform": "tests/models/test_hub.py",
    "trust_remote_code": "tests/models/test_folder.py",
    "device_map": "tests/pipeline/test_device.py",
    "dataset": "tests/calibration",
    "quant_mtp": "tests/pipeline/test_further_layers.py",
    "quant_nontext_module": "tests/pipeline/test_images.py",
    "processor": "tests/pipeline/test_images.py",
    "image_processor": "tests/pipeline/test_images.py",
    "extra_data_dir": "tests/pipeline/test_images.py",
    "template": "tests/pipeline/test_images.py",
    "imatrix": "tests/export/gguf/test_imatrix.py",
    "save_imatrix": "tests/export/gguf/test_save_imatrix.py",
    "gguf_template": "tests/export/gguf/test_template.py",
    "mmproj": "tests/export/gguf/test_mmproj.py",
    "avg_bits": "tests/autoscheme",
    "target_size": "tests/autoscheme",
    "target_kl": "tests/autoscheme",
    "scheme_options": "tests/autoscheme",
    "shared_layers": "tests/autoscheme",
    "ignore_scale_zp_bits": "tests/autoscheme",
    "score_method": "tests/autoscheme",
    "score_nsamples": "tests/autoscheme",
    "score_seqlen": "tests/autoscheme",
    "score_batch_size": "tests/autoscheme",
    "score_dataset": "tests/autoscheme",
    "score_device_map": "tests/autoscheme",
    "score_low_gpu_mem_usage": "tests/autoscheme",
    "expert_rows": "tests/pipeline/test_expert_rows.py",
    "enable_torch_compile": "tests/pipeline/test_compile.py",
    "enable_deterministic_algorithms": "tests/pipeline/test_ranks.py, tests/tuning/test_ranks.py",
    "dist_backend": "tests/ranks/test_place.py; for one process a warning",
    "memory": "tests/pipeline/fitting",
    "low_gpu_mem_usage": "a warning on a CPU",
    "low_cpu_mem_usage": "tests/pipeline/test_resume.py",
    "targets_ahead": "tests/pipeline/test_ahead.py",
    "output_dir": "every test",
    "overwrite": "tests/checkpoint/test_workfolder.py",
    "resume": "tests/pipeline/test_resume.py",
    "report": "tests/report/test_report_of_a_run.py",
    "dry_run": "tests/pipeline/test_dry_run.py",
    "data_type": "refused but for whole numbers: tests/schemes/test_rejections.py",
    "super_bits": "refused: tests/schemes/test_rejections.py",
    "super_group_size": "refused: tests/schemes/test_rejections.py",
    "act_group_size": "refused but for -1: tests/pipeline/test_activations.py",
    "act_data_type": "refused but for whole numbers: tests/pipeline/test_activations.py",
    "act_dynamic": "refused but for True: tests/pipeline/test_activations.py",
}

SILENT = {
    **{name: (value, {}) for name, value in DIFFUSION.items()},
    "ignore_scale_zp_bits": (True, {}),
    "score_method": ("kl", {}),
    "score_nsamples": (3, {}),
    "score_seqlen": (3, {}),
    "score_batch_size": (3, {}),
    "score_dataset": ("python-docs", {}),
    "score_device_map": ("cpu", {}),
    "score_low_gpu_mem_usage": (False, {}),
    "lr": (0.1, PLAIN),
    "minmax_lr": (0.1, {"enable_minmax_tuning": False}),
    "lr_scheduler": (lambda step, iters: 1.0, PLAIN),
    "momentum": (0.5, {"enable_adam": True}),
    "enable_adam": (True, PLAIN),
    "enable_minmax_tuning": (False, PLAIN),
    "enable_norm_bias_tuning": (True, PLAIN),
    "enable_quanted_input": (False, PLAIN),
    "gradient_accumulate_steps": (2, PLAIN),
    "nblocks": (2, PLAIN),
    "not_use_best_mse": (True, PLAIN),
    "dynamic_max_gap": (3, PLAIN),
    "enable_torch_compile": (True, PLAIN),
    "disable_opt_rtn": (True, {"iters": 1}),
    "nsamples": (3, PLAIN),
    "expert_rows": (64, {}),
    "smooth": (0, PLAIN),
    "batch_size": (4, PLAIN),
    "seqlen": (8, PLAIN),
    "seed": (3, PLAIN),
    "amp": (False, PLAIN),
    "enable_deterministic_algorithms": (True, PLAIN),
    "dist_backend": ("gloo", {}),
    "low_gpu_mem_usage": (True, {}),
    "memory": ("low", PLAIN),
    "targets_ahead": ("on", PLAIN),
    "act_group_size": (-1, {}),
    "act_sym": (False, {}),
    "act_data_type": ("int", {}),
    "act_dynamic": (True, {}),
    "act_percentile": (99.0, {}),
    "max_shard_size": ("1MB", {"format": "gguf:q8_0", "iters": 0}),
    "quant_lm_head": (True, {"format": "gguf:q8_0", "iters": 0}),
    "tokenizer": ("another", PLAIN),
    "processor": ("another", {}),
    "image_processor": ("another", {}),
    "extra_data_dir": (".", {}),
    "template": ("llava", {}),
    "platform": ("model_scope", PLAIN),
    "iters": (100, {"scheme": "BF16"}),
    "distill_steps": (2, {"scheme": "BF16"}),
    "distill_nsamples": (4, {}),
    "distill_lr": (0.1, {}),
    "distill_scales_only": (True, {}),
}
"""Option -> a value that does nothing in a run that is told so much else."""


def test_the_tables_name_every_option():
    assert {s.name for s in all_settings()} == {*ACTS, *SHOWN_ELSEWHERE}
    assert not set(ACTS) & set(SHOWN_ELSEWHERE)
    of_formats = {name for exporter in EXPORTERS.values() for name in exporter.idle}
    # Said of files of models that read images only: tests/export/gguf/test_language_models.py.
    of_formats.remove("quant_nontext_module")
    assert set(SILENT) == {name for row in IDLE for name in row.names} | of_formats


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_another_value_changes_what_is_written(tiny, tmp_path, caplog, monkeypatch, name):
    monkeypatch.setattr(logger, "propagate", True)
    model, change = tiny("llama"), ACTS[name]
    quantize(model, tmp_path / "before", **change.beside)
    quantize(model, tmp_path / "after", **{**change.beside, name: change.value})
    assert tree(tmp_path / "before") != tree(tmp_path / "after")
    assert not [said for said in caplog.messages if "no effect" in said and name in said.split(" ha")[0]]


@pytest.mark.parametrize("name", SILENT)
def test_what_does_nothing_is_said(tiny, caplog, monkeypatch, name):
    monkeypatch.setattr(logger, "propagate", True)
    value, beside = SILENT[name]
    notes = prepared(tiny, {**beside, name: value}, caplog)
    assert any(name in note.split(" ha")[0].split(", ") for note in notes), notes
    assert not any(name in note for note in prepared(tiny, beside, caplog))


def test_steps_of_a_run_that_rounds_nothing(tiny, caplog, monkeypatch):
    """It copied the model, and the user had asked for hours of tuning."""
    monkeypatch.setattr(logger, "propagate", True)
    asked = {"scheme": "BF16", "iters": 5, "distill_steps": 2, "lr": 0.1}
    (note,) = prepared(tiny, asked, caplog)
    assert note == ("iters, distill_steps, lr have no effect: no layer is rounded, so nothing is tuned")
    assert not prepared(tiny, {"scheme": "BF16", "iters": 0}, caplog)


def test_model_dtype_gives_kept_tensors_of_a_gguf_file_no_other_type(tiny):
    given = {"format": "gguf:q8_0", "iters": 0, "device_map": "cpu", "ignore_layers": "layers.1"}
    given |= {"model": str(tiny("llama", vocab_size=288)), "output_dir": "out"}
    types = []
    for wanted in (None, "float32"):
        options = build_options({**given, "model_dtype": wanted})
        job = prepare(options, rows=False, tokenizer=byte_level_tokenizer())
        types.append(job.exporters["gguf:q8_0"].histogram())
    assert types[0] == types[1]
    assert "bf16" in {name.casefold() for name in types[0]}


def prepared(tiny, given, caplog):
    """What is said of options without effect."""
    gguf = "format" in given
    short = {"device_map": "cpu"} if gguf else {"device_map": "cpu", "group_size": 32}
    model = tiny("llama", vocab_size=288) if gguf else tiny("llama")
    options = build_options({**short, "model": str(model), "output_dir": "out", **given})
    caplog.clear()
    prepare(options, rows=False, tokenizer=byte_level_tokenizer())
    return [said for said in caplog.messages if "no effect" in said]


@pytest.mark.parametrize("given", [PLAIN, {"iters": 1}], ids=["plain", "tuned"])
@pytest.mark.parametrize("wanted", ["float16", "fp32"])
def test_model_dtype(tiny, tmp_path, given, wanted):
    result = quantize(tiny("llama"), tmp_path / "out", model_dtype=wanted, **given)
    dtype = {"float16": torch.float16, "fp32": torch.float32}[wanted]
    kept = weights(tmp_path / "out")
    assert kept["model.embed_tokens.weight"].dtype is dtype
    assert kept["model.layers.0.input_layernorm.weight"].dtype is dtype
    assert kept["lm_head.weight"].dtype is dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert result.report["verified"]["auto_round"]["kl"] < 1e-3
    original = load_file(tiny("llama") / "model.safetensors")["lm_head.weight"]
    assert torch.equal(kept["lm_head.weight"], original.to(dtype))


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("gguf:q4_0", {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}),
        ("gguf:q4_1", {"bits": 4, "group_size": 32, "sym": False, "data_type": "int"}),
        ("gguf:q2_k_s", {"bits": 2, "group_size": 16, "super_bits": 4, "data_type": "int_asym_dq"}),
        ("gguf:q4_k_m", {"bits": 4, "act_bits": 16}),
        ("gguf:q4_0", {"scheme": {"bits": 4, "group_size": 32}}),
    ],
    ids=str,
)
def test_fields_that_say_what_a_gguf_type_says_are_taken(form, fields, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    assert _scheme_of(form, fields) == _scheme_of(form, {})
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "fields", "idle", "stored"),
    [
        ("gguf:q4_k_m", {"scheme": "W2A16"}, "scheme", "Q4_K, with 4 bits"),
        ("gguf:q4_k_m", {"scheme": "W4A16"}, "scheme", "Q4_K, with 4 bits"),
        ("gguf:q2_k_s", {"scheme": "W8A16"}, "scheme", "Q2_K, with 2 bits"),
        ("gguf:q8_0", {"scheme": "w4a16_mixed"}, "scheme", "Q8_0, with 8 bits"),
        ("gguf:bf16", {"scheme": "W4A16"}, "scheme", "BF16, with 16 bits"),
        ("gguf:q6_k", {"scheme": {"bits": 3, "group_size": 64}}, "scheme", "Q6_K, with 6 bits"),
        ("gguf:q5_1", {"scheme": QuantizationScheme(2, 64)}, "scheme", "Q5_1, with 5 bits"),
        ("gguf:q4_k_m", {"bits": 4, "group_size": 128, "sym": True}, "group_size, sym", "Q4_K, with 4 bits"),
        ("gguf:q4_0", {"bits": 4, "group_size": 128, "sym": False}, "group_size, sym", "Q4_0, with 4 bits"),
        ("gguf:bf16", {"bits": 4}, "bits", "BF16, with 16 bits"),
        ("gguf:q8_0", {"scheme": "W2A16", "bits": 3}, "scheme, bits", "Q8_0, with 8 bits"),
    ],
    ids=str,
)
def test_whole_numbers_give_way_to_a_gguf_format(form, fields, idle, stored, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    assert _scheme_of(form, fields) == _scheme_of(form, {})
    (said,) = caplog.messages
    assert said.startswith(f"{idle}: no effect")
    assert stored in said


def test_a_scheme_beside_packed_formats_is_theirs(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    given = {"model": "some/model", "format": "auto_round,gguf:q4_k_m", "scheme": "W2A16"}
    packed, file = runs_of(build_options(given))
    assert packed.scheme.scheme == "W2A16"
    assert [e.name for e in settle_formats(file)[1]] == ["gguf:q4_k_m"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("gguf:q2_k_s", {"data_type": "fp"}, "data_type: no type .* Q2_K"),
        ("gguf:q8_0", {"act_bits": 8}, "act_bits: no type"),
        ("gguf:q4_k_m", {"scheme": "INT8"}, "scheme: no type"),
        ("gguf:q4_k_m", {"scheme": "MXFP4"}, "scheme: no type"),
        ("gguf:q4_k_m", {"scheme": "FPW8A16"}, "scheme: no type"),
        ("gguf:q4_k_m", {"scheme": "BF16"}, "holds 16 bits"),
        ("gguf:q4_k_m", {"bits": 16}, "holds 16 bits"),
        ("gguf:q4_k_m", {"scheme": "W9A16"}, "unknown scheme"),
        ("gguf:q4_k_m", {"scheme": {"colour": 3}}, "unknown scheme field"),
        ("gguf:q4_0", {"scheme": "GGUF:Q4_0", "bits": 2}, "bits: the type of each tensor follows"),
    ],
    ids=str,
)
def test_what_no_gguf_type_holds_is_refused(form, fields, message):
    with pytest.raises(ConfigError, match=message):
        _scheme_of(form, fields)


def _scheme_of(form, fields):
    """Scheme options of a request for a GGUF file, single fields settled."""
    found, _ = settle_formats(build_options({"model": "some/model", "format": form, **fields}))
    assert found.scheme.overrides() == {}
    return found.scheme


@pytest.mark.parametrize(
    ("fields", "preset"),
    [
        ({"bits": 4}, "GGUF:Q4_K_S"),
        ({"bits": 8}, "GGUF:Q8_0"),
        ({"bits": 4, "group_size": 32, "sym": True}, "GGUF:Q4_0"),
        ({"bits": 4, "sym": False, "data_type": "int_asym_dq", "super_bits": 6}, "GGUF:Q4_K_S"),
        ({"bits": 6, "group_size": 32}, None),
        ({"bits": 4, "colour": 3}, None),
        ({"bits": 4, "colour": None}, None),
        ({"bits": 7}, None),
        ({"sym": True}, None),
        ({"bits": [4]}, None),
    ],
    ids=str,
)
def test_rules_of_a_gguf_file_may_give_the_fields_of_a_type(fields, preset):
    wanted = build_options(
        {"model": "some/model", "format": "gguf:q4_k_m", "layer_config": {"v_proj": fields}}
    )
    if preset is None:
        with pytest.raises(ConfigError, match="no GGUF type"):
            settle_formats(wanted)
        return
    found, _ = settle_formats(wanted)
    assert found.scheme.layer_config == {"v_proj": preset}


def test_a_scheme_that_a_gguf_file_does_not_follow_is_said(tiny, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    prepared(tiny, {"format": "gguf:q4_k_m", "scheme": "W4A16", "iters": 0}, caplog)
    assert "scheme: no effect" in caplog.text
    caplog.clear()
    prepared(tiny, {"format": "gguf:q4_k_m", "iters": 0}, caplog)
    assert "no effect" not in caplog.text
