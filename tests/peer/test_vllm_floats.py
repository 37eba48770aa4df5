"""What vLLM's CPU build does with floating `llm_compressor` folders, and with INT8.

FP8 by token and INT8 it multiplies itself (INT8 with AVX-512 only; else PyTorch does). The other folders it
reads as far as the choice of a kernel, which it has for GPUs only, or as far as a product that its CPU build
lacks. With one of PyTorch (`drivers/vllm_float_products.py`) it predicts the same, so nothing but the kernel
is missing. MXFP6 it has for no device: its compressed-tensors 0.17 knows floats of 4 and 8 bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_round.pipeline.result import Result
from peer.ours import logits_of
from peer.test_float_models import MODELS, in_memory, options, tokens
from peer.test_vllm import PEER, logprobs_of, mean_difference
from pipeline.runs import quantize

pytestmark = pytest.mark.peer


@dataclass(frozen=True)
class Row:
    """What vLLM's CPU build says to a scheme.

    Attributes:
        missing: what its error ends with where it stops; empty where it predicts.
        rounds_inputs: whether the product of PyTorch does.
        known: whether vLLM has the format for any device.
    """

    missing: str = ""
    rounds_inputs: bool = True
    known: bool = True


def no_kernel(kind: str) -> str:
    return f"Failed to find a kernel that can implement the {kind} linear layer"


ROWS = {
    "FP8_DYNAMIC": Row(),
    "INT8_W8A8": Row(),
    "FP8_STATIC": Row("narrow() cannot be applied to a 0-dim tensor"),
    "FP8_BLOCK": Row(no_kernel("ScaledMM")),
    "FPW8A16": Row(no_kernel("ScaledMM"), rounds_inputs=False),
    "NVFP4": Row(no_kernel("NVFP4")),
    "MXFP4": Row(no_kernel("MXFP4"), rounds_inputs=False),
    "MXFP8": Row(no_kernel("MXFP8"), rounds_inputs=False),
    "MXFP6": Row("Only num_bits in (8) are supported", known=False),
}
"""FP8_STATIC has steps of rows and one for its input, of which vLLM makes a tensor without dimensions
(`layer.input_scale.max()`) that its product by rows cannot take; llm-compressor's own folders of this scheme
have tensors of the same names and shapes (`test_llm_compressor.py`) and stop there, too."""

FLOORS = 2.0
"""Largest mean difference of log-probabilities, in what bfloat16, in which vLLM runs, does to them anyway: to
those of the unquantized model in vLLM, and to those of the model in memory, where an input on the border of
two codes falls to the other side."""


@dataclass(frozen=True)
class Asked:
    """Tokens, logits of the model in memory, vLLM's answers with both products, and what bfloat16 does."""

    ids: list[int]
    wanted: Mapping[str, Tensor]
    own: Mapping[str, dict[str, Any]]
    replaced: Mapping[str, dict[str, Any]]
    floors: Mapping[str, float]


@pytest.fixture(scope="module", params=MODELS[:1], ids=lambda model: model.name)
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    PEER.python()
    model, scratch = request.param, tmp_path_factory.mktemp("vllm")
    ids = tokens(model)
    answers = {name: (scratch / f"{name}.json", scratch / f"{name}-floats.json") for name in ROWS}
    wanted, floors = {}, {}
    jobs = [{"folder": str(model), "out": str(scratch / "floor.json"), "replaced": False}]
    for name, row in ROWS.items():
        result = quantize(model, scratch / name, format="fake,llm_compressor", **options(model, name))
        folder = result.folders[1]
        wanted[name], rough = (predicted(row, model, result, ids, each) for each in ("float32", "bfloat16"))
        floors[name] = mean_difference(logprobs_of(rough, ids), wanted[name], ids)
        own, replaced = answers[name]
        jobs.append({"folder": str(folder), "out": str(own), "replaced": False})
        if row.known:
            jobs.append({"folder": str(folder), "out": str(replaced), "replaced": "floats"})
    PEER.run("load_with_vllm.py", {"ids": ids, "jobs": jobs}, scratch / "asked")
    plain = json.loads((scratch / "floor.json").read_text())
    assert "error" not in plain, plain["error"]
    floor = mean_difference(plain["logprobs"], logits_of(model, ids)[0], ids)
    own, replaced = (
        {name: json.loads(paths[i].read_text()) for name, paths in answers.items() if paths[i].exists()}
        for i in (0, 1)
    )
    return Asked(ids, wanted, own, replaced, {name: max(floor, each) for name, each in floors.items()})


def predicted(row: Row, model: Path, result: Result, ids: list[int], dtype: str) -> Tensor:
    """Logits of the model in memory, whose inputs are rounded where vLLM's product does so."""
    if row.rounds_inputs:
        return in_memory(model, result, ids, dtype)
    return logits_of(result.folders[0], ids, dtype=getattr(torch, dtype))[0]


def check(asked: Asked, name: str, answer: dict[str, Any], note: Callable[[str, object], None]) -> None:
    """It predicts as the model in memory does."""
    assert "error" not in answer, answer["error"][-2000:]
    found = mean_difference(answer["logprobs"], asked.wanted[name], asked.ids)
    bound = FLOORS * asked.floors[name]
    note("difference and bound", (found, bound))
    assert found < bound, f"{found:.2g} nats a token from the model in memory, at most {bound:.2g}"


@pytest.mark.parametrize("name", ROWS)
def test_it_predicts_the_same_or_lacks_a_kernel(
    asked: Asked, name: str, record_property: Callable[[str, object], None]
) -> None:
    answer, missing = asked.own[name], ROWS[name].missing
    if missing and "error" in answer:  # other processors have more kernels
        assert missing in answer["error"].rpartition("\n  File ")[2], answer["error"][-2000:]
    else:
        check(asked, name, answer, record_property)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.known])
def test_with_a_product_it_predicts_the_same(
    asked: Asked, name: str, record_property: Callable[[str, object], None]
) -> None:
    check(asked, name, asked.replaced[name], record_property)
