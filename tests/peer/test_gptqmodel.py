"""GPTQModel reads our `auto_gptq`, `gptqmodel` and `auto_awq` folders on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peer.ours import IDS, NEW_TOKENS, Made, check_answer, make
from peer.peers import GPTQMODEL, Answer, ask

pytestmark = pytest.mark.peer

MIXED = {
    "layer_config": {"down_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"group_size": 32}},
    "ignore_layers": "layers.0.self_attn.q_proj,o_proj",
}
WIDTHS = {
    "layer_config": {
        "mlp": {"bits": 2, "group_size": 64},
        "model.layers.0.mlp.down_proj": {"bits": 8},
        "layers.1.self_attn": {"bits": 8, "group_size": 128},
    }
}
"""As AutoScheme chooses among W2A16G64, W4A16 and W8A16."""
KEPT = {"ignore_layers": "layers.0.self_attn.q_proj,o_proj"}

PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "w2": ({"bits": 2, "group_size": 32}, ("auto_gptq", "gptqmodel")),
    "w3": ({"bits": 3}, ("auto_gptq", "gptqmodel")),
    "w4": ({"bits": 4}, ("auto_gptq", "gptqmodel", "auto_awq")),
    "w8": ({"bits": 8, "group_size": -1}, ("auto_gptq", "gptqmodel")),
    "w2-asym": ({"bits": 2, "group_size": 64, "sym": False}, ("gptqmodel",)),
    "w3-asym": ({"bits": 3, "group_size": 32, "sym": False}, ("gptqmodel",)),
    "w4-asym": ({"bits": 4, "group_size": 32, "sym": False}, ("gptqmodel", "auto_awq")),
    "w8-asym": ({"bits": 8, "sym": False}, ("gptqmodel",)),
    "w4-mixed": ({"bits": 4, **MIXED}, ("auto_gptq", "gptqmodel")),
    "w4-widths": ({"bits": 4, **WIDTHS}, ("auto_gptq", "gptqmodel")),
    "w4-kept": ({"bits": 4, "sym": False, "group_size": 64, **KEPT}, ("auto_awq",)),
    "w4-head": ({"bits": 4, "quant_lm_head": True}, ("auto_gptq",)),
    "w4-biases": ({"bits": 4}, ("auto_gptq", "auto_awq")),
}
"""Plan -> options of the quantizer, formats."""

PLAIN = {"auto_gptq": "gptq_torch", "gptqmodel": "gptq_torch", "auto_awq": "awq_torch"}
"""Format -> the kernel of GPTQModel that dequantizes and multiplies; it takes every width."""

BY_ITSELF = (("w4", "auto_gptq"), ("w4-asym", "gptqmodel"), ("w4", "auto_awq"), ("w4-asym", "auto_awq"))
"""Folders that are loaded with the kernel that GPTQModel prefers for them, too."""


@dataclass(frozen=True)
class Answers:
    """What was made, and what GPTQModel made of it by `(plan, format, kernel)`."""

    made: dict[str, Made]
    read: dict[str, Answer]


@pytest.fixture(scope="module")
def answers(demo: Path, biased: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    GPTQMODEL.python()
    scratch = tmp_path_factory.mktemp("gptqmodel")
    made, questions = {}, {}
    for plan, (options, formats) in PLANS.items():
        model = biased if plan == "w4-biases" else demo
        made[plan] = make(model, scratch / plan, formats, **options)
        for fmt in formats:
            questions[f"{plan}-{fmt}-plain"] = made[plan].question(fmt, backend=PLAIN[fmt])
    for plan, fmt in BY_ITSELF:
        questions[f"{plan}-{fmt}-auto"] = made[plan].question(fmt, dtype="bfloat16")
    return Answers(
        made, ask(GPTQMODEL, "load_with_gptqmodel.py", IDS, NEW_TOKENS, questions, scratch / "asked")
    )


@pytest.mark.parametrize(("plan", "fmt"), [(p, f) for p, (_, formats) in PLANS.items() for f in formats])
def test_plain_kernel(answers: Answers, plan: str, fmt: str) -> None:
    answer = answers.read[f"{plan}-{fmt}-plain"]
    check_answer(answer, answers.made[plan])
    assert answer.dtype == "float16"


@pytest.mark.parametrize(("plan", "fmt"), BY_ITSELF)
def test_preferred_kernel(answers: Answers, plan: str, fmt: str) -> None:
    """Kernels on PyTorch's int4 matrices round `scale * (8 - zero)` apart: up to 8 steps, once."""
    answer = answers.read[f"{plan}-{fmt}-auto"]
    check_answer(answer, answers.made[plan], of_row=4.0)
    assert not set(answer.modules.values()) & {"TorchLinear", "AwqTorchLinear"}, answer.modules
