"""The whole job on a GPU, and the folders it writes run by every kernel: tiny models, few steps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig

from accelerator import DEVICE, NEEDED, needs_cuda
from auto_round.kernels.table import KERNELS
from pipeline.runs import quantize

pytestmark = NEEDED

HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16


def on_device(model, out, **given):
    """A run on the device under test; it compares the reloaded folder with what was tuned by itself."""
    return quantize(model, out, device_map=DEVICE, **given)


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("qwen3", {}),
        ("llama", {"low_gpu_mem_usage": True}),
        ("llama", {"enable_alg_ext": True}),
        ("llama", {"iters": 0}),
        ("llama", {"iters": 0, "disable_opt_rtn": True}),
        ("llama", {"bits": 2, "sym": False, "quant_lm_head": True}),
        ("llama", {"nblocks": 2, "enable_norm_bias_tuning": True}),
        ("gemma3_text", {"enable_adam": True}),
        ("qwen3_moe", {}),
    ],
    ids=str,
)
def test_runs(tiny, tmp_path, family, given):
    result = on_device(tiny(family), tmp_path / "out", **given)
    verified = result.report.get("verified", {})
    assert all(figures["kl"] < 1e-3 for figures in verified.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_models_of_other_dtypes(tiny, tmp_path, dtype):
    result = on_device(tiny("llama", dtype), tmp_path / "out")
    assert result.report["verified"]["auto_round"]["kl"] < 1e-3


@needs_cuda
def test_a_compiled_run(tiny, tmp_path):
    result = on_device(tiny("llama"), tmp_path / "out", enable_torch_compile=True, iters=20)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-3


@needs_cuda
def test_deterministic_runs_give_the_same_bytes(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    given = {"enable_deterministic_algorithms": True, "iters": 10}
    folders = [on_device(tiny("llama"), tmp_path / name, **given).folders[0] for name in ("a", "b")]
    first, second = ((f / "model.safetensors").read_bytes() for f in folders)
    assert first == second


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    return quantize(tiny("llama"), out, device_map="cpu", verify=False).folders[0]


@pytest.mark.parametrize("backend", ["triton", "torch_int4", "torch", "auto"])
def test_loaded_models_generate(packed, backend):
    """All kernels predict the same; what is saved again has not changed."""
    if backend != "auto":
        spec = KERNELS[backend].sample
        if refusal := KERNELS[backend].kernel.refuses(spec if spec.device == DEVICE else replaced(spec)):
            pytest.skip(str(refusal))

    def load(name):
        settings = {"quantization_config": AutoRoundConfig(backend=name), "dtype": HALF}
        return AutoModelForCausalLM.from_pretrained(packed, device_map=DEVICE, **settings).eval()

    model, exact = load(backend), load("torch")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        got, want = model(input_ids=ids).logits, exact(input_ids=ids).logits
    assert torch.allclose(got.float(), want.float(), atol=0.05, rtol=0.05)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    assert output.shape == (2, 16)
    state, other = model.state_dict(), exact.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def replaced(spec):
    from dataclasses import replace

    return replace(spec, device=DEVICE)


@needs_cuda
def test_a_loaded_model_compiles(packed):
    model = AutoModelForCausalLM.from_pretrained(packed, device_map=DEVICE, dtype=HALF).eval()
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model)(input_ids=ids, use_cache=False).logits
    assert torch.allclose(plain.float(), compiled.float(), atol=0.05, rtol=0.05)
