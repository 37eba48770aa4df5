"""The signature of a run holds every option and every version that has a part in its bytes."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from auto_round.config import TuneOptions, all_settings, build_options
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.machine import description as machine
from auto_round.pipeline.writing.signature import signature
from auto_round.tuning.settings import tune_settings
from pipeline.runs import SHORT, token_rows

CHANGES = {
    "model_dtype": "float32",
    "scheme": "W8A16",
    "layer_config": {"k_proj": {"bits": 8}},
    "bits": 8,
    "group_size": 16,
    "sym": False,
    "scale_dtype": "float32",
    "ignore_layers": ("k_proj",),
    "quant_lm_head": True,
    "to_quant_block_names": ("model.layers.1",),
    "nsamples": 3,
    "seqlen": 8,
    "seed": 7,
    "act_percentile": 99.0,
    "expert_rows": 64,
    "iters": 3,
    "batch_size": 4,
    "gradient_accumulate_steps": 2,
    "lr": 0.1,
    "minmax_lr": 0.1,
    "lr_scheduler": lambda step, iters: 0.5,
    "momentum": 0.5,
    "nblocks": 2,
    "enable_adam": True,
    "enable_minmax_tuning": False,
    "enable_norm_bias_tuning": True,
    "enable_quanted_input": False,
    "not_use_best_mse": False,
    "dynamic_max_gap": 5,
    "amp": False,
    "enable_torch_compile": True,
    "disable_opt_rtn": True,
    "enable_alg_ext": True,
    "smooth": 0.5,
    "distill_steps": 2,
    "distill_nsamples": 3,
    "distill_lr": 0.1,
    "distill_scales_only": True,
    "enable_deterministic_algorithms": True,
    "format": "fake",
    "max_shard_size": "64KB",
    "resume": False,
}
"""Option -> another value than that of the run before."""

ACTIVATIONS = dict.fromkeys(
    ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"), "of the plan, as bits are"
)
SCALES = dict.fromkeys(
    ("static_kv_dtype", "static_kv_granularity", "static_attention_dtype", "static_attention_granularity"),
    "of the formats, which are told what scales they will be given",
)
MIXTURE = dict.fromkeys(
    (
        *("avg_bits", "target_size", "target_kl", "scheme_options", "shared_layers", "ignore_scale_zp_bits"),
        *("score_method", "score_dataset", "score_nsamples", "score_seqlen", "score_batch_size"),
        *("score_device_map", "score_low_gpu_mem_usage"),
    ),
    "the plan that AutoScheme chose is compared",
)
DIFFUSION = dict.fromkeys(
    (
        *("components", "num_inference_steps", "steps_per_caption", "guidance_scale", "generator_seed"),
        *("pipeline_args", "prompt", "prompt_file", "metrics", "image_save_dir"),
    ),
    "of pipelines of diffusers, which have a signature of their own: tests/diffusion/test_run.py",
)
ELSEWHERE = {
    **ACTIVATIONS,
    **DIFFUSION,
    **SCALES,
    **MIXTURE,
    "super_bits": "of the plan, as bits are",
    "super_group_size": "of the plan, as bits are",
    "data_type": "of the plan, as bits are",
    "model": "the weights themselves are compared",
    "tokenizer": "the rows themselves are compared",
    "dataset": "the rows themselves are compared",
    "processor": "the rows themselves are compared",
    "image_processor": "the rows themselves are compared",
    "template": "the rows themselves are compared",
    "extra_data_dir": "the rows themselves are compared",
    "quant_mtp": "of the plan, which names the layers",
    "quant_nontext_module": "of the plan, which names the layers of encoders",
    "imatrix": "the importances themselves are compared",
    "gguf_template": "the types of the file's tensors are compared",
    "mmproj": "written after the last byte of the language model, from the model itself",
    "save_imatrix": "that one is written is compared; only GGUF files have it",
    "platform": "where the model comes from",
    "trust_remote_code": "without it the run would not have begun",
    "device_map": "the kind of device is compared, and the machine",
    "memory": "where streams lie; how many rows go through at once is compared",
    "low_gpu_mem_usage": "where streams lie; on an accelerator how many rows go through at once is compared",
    "low_cpu_mem_usage": "where streams lie",
    "targets_ahead": "when something is computed, not what",
    "dist_backend": "how processes talk; a run continues on any number of them",
    "output_dir": "another folder is another run",
    "overwrite": "what happens to an older folder",
    "verify": "done after the last byte of the weights",
    "report": "drawn after the last byte of the weights",
    "dry_run": "writes nothing",
}


@pytest.fixture(scope="module")
def job(tiny):
    """Prepare a run of a tiny model; what only tuning is told changes nothing else."""
    model = str(tiny("llama"))
    tuning = {field.name for field in fields(TuneOptions)}

    def options(given):
        return build_options({**SHORT, "model": model, "output_dir": "out", **given})

    first = prepare(options({}), dataset=token_rows())

    def make(**given):
        if given.keys() - tuning or "amp" in given:
            return prepare(options(given), dataset=token_rows())
        wanted = options(given)
        return replace(first, options=wanted, tune=tune_settings(wanted.tune, 4))

    return make


@pytest.fixture(scope="module")
def first(job):
    return written(job())


def written(job):
    """The signature as the journal has it."""
    return json.loads(json.dumps(signature(job)))


def test_every_option_is_in_it_or_has_no_part_in_the_bytes():
    assert {s.name for s in all_settings()} == {*CHANGES, *ELSEWHERE}
    for names in (CHANGES, ELSEWHERE):
        assert set(names) <= {s.name for s in all_settings()}


def test_the_same_again_is_the_same_run(job, first):
    assert written(job()) == first


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_is_another_run(job, first, name):
    assert written(job(**{name: CHANGES[name]})) != first


def test_scales_of_the_cache_make_another_run(job):
    asked = ({}, {"static_kv_dtype": "fp8"}, {"static_attention_dtype": "fp8"})
    heads = {"static_kv_dtype": "fp8", "static_kv_granularity": "head"}
    found = [written(job(format="llm_compressor", **given)) for given in (*asked, heads)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_schedules_are_compared_by_their_values(job):
    def schedule(factor, step, iters):
        return factor * step / iters

    one, same, other = (written(job(lr_scheduler=partial(schedule, f))) for f in (1.0, 1.0, 0.5))
    assert one == same
    assert one != other


@pytest.mark.parametrize("name", machine.LIBRARIES)
def test_versions(monkeypatch, name):
    before = machine.versions()
    monkeypatch.setattr(machine.metadata, "version", lambda package: f"other {package}")
    assert machine.versions()[name] == f"other {name}" != before[name]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("setenv", "ONEDNN_MAX_CPU_ISA", "another one"), "settings"),
        (("setattr", torch.backends.cpu, "get_cpu_capability", lambda: "VSX"), "capability"),
        (("setattr", torch.cpu, "get_capabilities", lambda: {"cpu_name": "x", "avx": True}), "instructions"),
        (("setattr", torch, "get_float32_matmul_precision", lambda: "medium"), "float32_products"),
        (("setenv", "PATH", ""), "compiler"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_machines(monkeypatch, change, key):
    cpu = torch.device("cpu")
    before = machine.machine(cpu)
    assert before == machine.machine(cpu)
    kind, *words = change
    getattr(monkeypatch, kind)(*words, **({"raising": False} if kind == "setattr" else {}))
    assert machine.machine(cpu)[key] != before[key]


def test_the_number_of_cores_is_no_part_of_a_machine(monkeypatch):
    known = {"cpu_name": "x", "avx": True, "num_logical_cores": 2}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    before = machine.machine(torch.device("cpu"))
    known["num_logical_cores"] = 64
    assert machine.machine(torch.device("cpu")) == before
