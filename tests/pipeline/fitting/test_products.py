"""Programs that oneDNN keeps for products in bfloat16: how many, and what the plan counts."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from auto_round.config import build_options
from auto_round.models.causal_attention import QUERIES
from auto_round.pipeline.deciding.fit import workload
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.fitting.products import OF_ATTENTION, PROGRAM, kept_products
from auto_round.pipeline.machine.memory import KEPT_PRODUCTS
from pipeline.runs import ROWS, SHORT

VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
GPU = torch.device("cuda", 0)


def work_of(folder, **settings):
    options = build_options({**SHORT, "model": str(folder), "output_dir": "out", **settings})
    return workload(prepare(options, dataset=ROWS))


def kept(work, rows):
    block = [layer for layer in work.source.layers if layer.block == 0]
    return kept_products(work, block, rows) / PROGRAM


def test_programs_are_counted_by_shapes_and_sizes_of_batches(tiny):
    work = replace(work_of(tiny("llama"), iters=4, batch_size=8), rows=18, held_out=2)
    whole = len({layer.shape for layer in work.source.layers if layer.block == 0})
    passed = 2 * math.ceil(work.seqlen / QUERIES)  # in attention without gradients
    # Rows of the steps: 2, 2, 2, 4. All rows pass as 4 at a time and two more, those held out as 2.
    assert kept(work, 4) == 2 * (3 * whole + OF_ATTENTION) + passed
    # Row by row there is one size.
    assert kept(work, 1) == 3 * whole + OF_ATTENTION + passed
    assert kept(replace(work, tune=replace(work.tune, iters=0)), 4) == 2 * whole + passed
    assert kept(replace(work, rows=0), 4) == 0


def test_there_are_none_in_float32_and_on_accelerators(tiny):
    work = work_of(tiny("llama"))
    assert kept(work, 4) > 0
    assert kept(replace(work, dtype=torch.float32), 4) == kept(replace(work, device=GPU), 4) == 0


def test_experts_get_one_of_few_numbers_of_tokens(tiny):
    """However many steps there are."""
    work = replace(work_of(tiny("qwen3_moe")), seqlen=128, rows=64)
    longer = replace(work, seqlen=512)
    assert kept(longer, 1) > kept(work, 1) > 0
    assert kept(replace(longer, tune=replace(work.tune, iters=100)), 1) == kept(
        replace(longer, tune=replace(work.tune, iters=200)), 1
    )


def test_a_run_keeps_few_unless_the_user_says_another_number(tiny, monkeypatch):
    monkeypatch.delenv(VARIABLES[0], raising=False)
    monkeypatch.setenv(VARIABLES[1], "7")
    work_of(tiny("llama"), amp=False)
    assert VARIABLES[0] not in os.environ
    work_of(tiny("llama"))
    assert [os.environ[name] for name in VARIABLES] == [str(KEPT_PRODUCTS), "7"]


SCRIPT = """
import torch
from auto_round.pipeline.machine.memory import keep_few_products, resident_bytes
torch.set_num_threads(1)
keep_few_products(torch.device("cpu"), torch.bfloat16)
weight = torch.zeros(256, 512, dtype=torch.bfloat16)
def multiply(first, last):
    for tokens in range(first, last):
        torch.nn.functional.linear(torch.zeros(tokens, 512, dtype=torch.bfloat16), weight)
multiply(8, 9)
before = resident_bytes()
multiply(9, 9 + COUNT)
few = resident_bytes()
multiply(9 + COUNT, 9 + 5 * COUNT)
print(few - before, resident_bytes() - few)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no bfloat16 arithmetic"
)
def test_programs_take_what_the_plan_counts_and_no_more(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    script = SCRIPT.replace("COUNT", str(KEPT_PRODUCTS))
    said = subprocess.check_output([sys.executable, "-c", script], text=True)
    first, later = map(int, said.split())
    assert 0.8 <= first / (KEPT_PRODUCTS * PROGRAM) <= 1.5  # with holes
    assert later <= first  # four times as many more shapes; unbounded, four times as much
