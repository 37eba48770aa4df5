"""Transformers with compressed-tensors reads our `llm_compressor` folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from auto_round.numerics.activation import ACTIVATIONS
from auto_round.numerics.activation_int import tensor_int
from peer.ours import (
    DEMO,
    IDS,
    NEW_TOKENS,
    Made,
    check_answer,
    check_weights,
    make,
)
from peer.peers import COMPRESSED_TENSORS, Answer, ask

pytestmark = pytest.mark.peer

DRIVER = "load_with_compressed_tensors.py"
MIXED = {
    "layer_config": {"down_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"group_size": 32}},
    "ignore_layers": "layers.0.self_attn.q_proj,o_proj",
}
PLANS: dict[str, dict[str, Any]] = {
    "w2": {"scheme": "W2A16G32"},
    "w3": {"scheme": "W3A16"},
    "w4": {"scheme": "W4A16"},
    "w4-asym": {"scheme": "W4A16", "sym": False, "group_size": 32},
    "w4-rows": {"scheme": "W4A16", "group_size": -1},
    "w5": {"scheme": "W5A16"},
    "w8": {"scheme": "W8A16"},
    "w8-asym": {"scheme": "W8A16", "sym": False},
    "w4-mixed": {"scheme": "W4A16", **MIXED},
    "w4-head": {"scheme": "W4A16", "quant_lm_head": True},
    "w4-biases": {"scheme": "W4A16"},
    "w4-bf16": {"scheme": "W4A16"},
    "int8": {"scheme": "INT8_W8A8", "group_size": -1},
}
"""Plan -> options of the quantizer."""

WAYS = ("", "dequantize")
"""Layers unpacked at their first use, or while they are read."""

READ = [(plan, way) for plan in PLANS for way in WAYS]


@dataclass(frozen=True)
class Answers:
    """What was made, and what the peer made of it by `(plan, way)`."""

    made: dict[str, Made]
    read: dict[tuple[str, str], Answer]


@pytest.fixture(scope="module")
def answers(demo: Path, biased: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    COMPRESSED_TENSORS.python()
    scratch = tmp_path_factory.mktemp("compressed")
    models = {"w4-biases": biased, "w4-bf16": DEMO}
    made = {
        plan: make(
            models.get(plan, demo), scratch / plan, ("llm_compressor",), **{"group_size": None, **given}
        )
        for plan, given in PLANS.items()
    }
    dtypes = {("w4-bf16", way): "bfloat16" for way in WAYS} | {("int8", ""): "float32"}
    questions = {
        f"{plan}-{way}": made[plan].question(
            "llm_compressor", dtype=dtypes.get((plan, way), "float16"), backend=way
        )
        for plan, way in READ
    }
    read = ask(COMPRESSED_TENSORS, DRIVER, IDS, NEW_TOKENS, questions, scratch / "asked")
    return Answers(made, {(plan, way): read[f"{plan}-{way}"] for plan, way in READ})


ONE_SCHEME = pytest.mark.xfail(
    strict=True,
    reason="Transformers 5.23 with dequantize=True unpacks all layers by one scheme (get_dense_scheme)",
)
"""That the bytes are right shows the other way."""


@pytest.mark.parametrize(
    ("plan", "way"),
    [
        pytest.param(plan, way, marks=ONE_SCHEME if (plan, way) == ("w4-mixed", "dequantize") else ())
        for plan, way in READ
        if plan != "int8"
    ],
)
def test_weights_only(answers: Answers, plan: str, way: str) -> None:
    check_answer(answers.read[plan, way], answers.made[plan])


@torch.inference_mode()
def logits_with_rounded_inputs(
    made: Made, by_token: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS["int8_token_sym"].round
) -> torch.Tensor:
    """Logits of the dequantized model whose quantized layers get their inputs rounded to 8 bits.

    A step is the stored one where the folder has one, else `by_token` rounds.
    """
    model = AutoModelForCausalLM.from_pretrained(made.fake, dtype=torch.float32).eval()
    stored = load_file(made.folders["llm_compressor"] / "model.safetensors")
    for name in made.weights:
        rounding = by_token
        if (step := stored.get(f"{name}.input_scale")) is not None:
            zero = stored.get(f"{name}.input_zero_point")
            rounding = tensor_int(8, sym=zero is None).holding(step, zero).round
        hook = partial(_rounded, rounding)
        model.get_submodule(name).register_forward_pre_hook(hook)
    return model(input_ids=torch.tensor([IDS]), use_cache=False).logits.float()


def _rounded(rounding: Callable[[torch.Tensor], torch.Tensor], _: object, args: tuple[Any, ...]) -> Any:
    return rounding(args[0]), *args[1:]


def test_int8_weights_and_inputs(answers: Answers) -> None:
    answer, made = answers.read["int8", ""], answers.made["int8"]
    assert answer.error is None, answer.error
    # A unit vector is 127 steps of 1/127.5 to the layer.
    check_weights(answer, {n: w * (127 / 127.5) for n, w in made.weights.items()}, of_row=4.0)
    want = logits_with_rounded_inputs(made)
    plain = AutoModelForCausalLM.from_pretrained(made.fake, dtype=torch.float32)
    with torch.inference_mode():
        unrounded = plain(input_ids=torch.tensor([IDS]), use_cache=False).logits
    # Inputs on the edge between two codes fall to either side; without any rounding the difference is larger.
    difference = (answer.logits - want).abs().max()
    assert difference < 0.25 * (answer.logits - unrounded).abs().max()


def test_int8_unpacked_while_reading(answers: Answers) -> None:
    """Inputs are not rounded then: this shows the weights."""
    check_answer(answers.read["int8", "dequantize"], answers.made["int8"])
