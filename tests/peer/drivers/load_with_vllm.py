"""Load folders with vLLM on a CPU: the log-probability of each token of a fixed text.

vLLM is imported once; each folder gets a process of its own, forked from there.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # CPUs with AMX would round activations to 8 bits
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import torch
import vllm.model_executor.models.qwen3
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm import LLM, SamplingParams
from vllm_float_products import multiply_floats
from vllm_products import multiply_experts, replace_products

TOKENS = 128
"""Longest text."""

FOUR_BITS = "cpu_gemm_wna16"
"""Operator that vLLM's build for AVX2 lacks; where it is, 8 by 8 bits are exact, too."""


def answer(job: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """`{"logprobs": [tokens - 1]}`."""
    if job["replaced"] == "floats":
        multiply_floats()
    if job["replaced"] is True or not hasattr(torch.ops._C, FOUR_BITS):
        replace_products()
    if job.get("experts"):
        multiply_experts()
    engine = LLM(
        model=job["folder"],
        quantization=job.get("quantization"),
        dtype=job.get("dtype", "bfloat16"),
        moe_backend="emulation" if job.get("experts") else "auto",
        max_model_len=TOKENS,
        max_num_seqs=1,
        max_num_batched_tokens=TOKENS,
        num_gpu_blocks_override=4,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (found,) = engine.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    rows = zip(ids[1:], found.prompt_logprobs[1:], strict=True)
    return {"logprobs": [row[token].logprob for token, row in rows]}


def serve(job: dict[str, Any], ids: list[int]) -> None:
    """Answer one job into `out`, in a fork; what vLLM says goes into a file beside it."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    out = Path(job["out"])
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        facts = answer(job, ids)
    except BaseException:  # noqa: BLE001  an answer, too
        facts = {"error": traceback.format_exc()}
    out.write_text(json.dumps(facts))
    os._exit(0)


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    for one in request["jobs"]:
        serve(one, request["ids"])
