"""Floating schemes and INT8 on trained models: Transformers predicts what was quantized.

`llm_compressor` folders are loaded by Transformers with compressed-tensors in a process that does not know
this package, `auto_round` folders by Transformers with it. Both are compared with the model in memory: dense
rounded weights, and inputs rounded as the plan says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.result import Result
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.tuning.quantized_inputs import quantized_inputs
from peer.ours import DEMO, IDS, logits_of
from peer.peers import COMPRESSED_TENSORS, Answer, Question, ask
from pipeline.runs import quantize, token_rows

pytestmark = pytest.mark.peer

FP8_DYNAMIC = {"scheme": "FP8_STATIC", "act_dynamic": True, "act_group_size": -1}
SCHEMES: dict[str, dict[str, Any]] = {
    **{name: {"scheme": name} for name in ("MXFP4", "MXFP6", "MXFP8", "NVFP4", "FPW8A16")},
    **{name: {"scheme": name} for name in ("FP8_STATIC", "FP8_BLOCK", "INT8_W8A8")},
    "FP8_DYNAMIC": FP8_DYNAMIC,
}
FORMATS = ("llm_compressor", "auto_round")
EXACT, COARSE = 1e-6, 1e-2
"""Most divergence, nats per token."""
DIVIDES_IN_BFLOAT16 = ("FP8_STATIC", "FP8_BLOCK", "FP8_DYNAMIC")
"""Schemes whose inputs compressed-tensors divides by their steps in the dtype of the model: a number on the
border of two codes may fall to the other side (0.006 on an 8-million-weight model). vLLM and this package
divide in float32."""

MODELS = [Path(p) for p in os.environ.get("PEER_MODELS", str(DEMO)).split(os.pathsep)]


@dataclass(frozen=True)
class Made:
    """One scheme on one model: what was written, and logits of the model in memory `[tokens, vocabulary]`."""

    folders: Mapping[str, Path]
    in_memory: Tensor


@torch.inference_mode()
def in_memory(model: Path, result: Result) -> Tensor:
    """Logits of the dense rounded model whose inputs are rounded as planned."""
    with FolderSource.open(model) as source:
        planned = activation_formats(result.plan, source.layers)
    formats = InputRanges.from_entries(result.report["blocks"]).formats(planned)
    dense = AutoModelForCausalLM.from_pretrained(result.folders[0], dtype=torch.bfloat16).eval()
    with quantized_inputs(dense, formats):
        logits: Tensor = dense(input_ids=torch.tensor([IDS]), use_cache=False).logits
    return logits[0].float()


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    COMPRESSED_TENSORS.python()
    found, model = {}, request.param
    given = {"group_size": None, "iters": 0, "disable_opt_rtn": True, "nsamples": 2, "seqlen": 64}
    for name, scheme in SCHEMES.items():
        out = tmp_path_factory.mktemp(name)
        common = {"format": ",".join(("fake", *FORMATS)), "verify": False, "dataset": token_rows(3, 64)}
        result = quantize(model, out, **{**given, **common, **scheme})
        found[name] = Made(dict(zip(FORMATS, result.folders[1:], strict=True)), in_memory(model, result))
    return found


@pytest.fixture(scope="module")
def read(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the other process says of all `llm_compressor` folders."""
    questions = {
        name: Question(each.folders["llm_compressor"], {}, "bfloat16") for name, each in made.items()
    }
    return ask(
        COMPRESSED_TENSORS,
        "load_with_compressed_tensors.py",
        IDS,
        1,
        questions,
        tmp_path_factory.mktemp("asked"),
    )


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL of rows of logits, nats per token."""
    p, q = (x.double().log_softmax(-1) for x in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_with_compressed_tensors(
    made: dict[str, Made], read: dict[str, Answer], name: str
) -> None:
    answer = read[name]
    assert answer.error is None, answer.error
    bound = COARSE if name in DIVIDES_IN_BFLOAT16 else EXACT
    assert divergence(made[name].in_memory, answer.logits[0]) < bound


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_with_this_package(made: dict[str, Made], name: str) -> None:
    logits = logits_of(made[name].folders["auto_round"], dtype=torch.bfloat16)[0]
    assert divergence(made[name].in_memory, logits) < EXACT
