"""Floating schemes and INT8 on trained models: Transformers predicts what was quantized.

`llm_compressor` folders are loaded by Transformers with compressed-tensors in a process that does not know
this package, `auto_round` folders by Transformers with it. Both are compared with the model in memory: dense
rounded weights, and inputs rounded as the plan says. Layers whose inputs are no whole number of blocks of 128
get a step for each row and each token instead (SmolLM2-135M: all with 576 inputs).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRoundConfig
from auto_round.models.folder import FolderSource
from auto_round.pipeline.deciding.activations import activation_formats
from auto_round.pipeline.result import Result
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.tuning.quantized_inputs import quantized_inputs
from peer.ours import DEMO, logits_of
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
DIVIDES_IN_DTYPE = ("FP8_STATIC", "FP8_BLOCK", "FP8_DYNAMIC")
"""Schemes whose inputs compressed-tensors divides by their steps in the dtype of the model: in bfloat16 a
number on the border of two codes may fall to the other side, where vLLM and this package divide in float32.
So predictions in bfloat16 may differ by `COARSE`, or by `FLOORS` times what computing in bfloat16 does to
them anyway; folders of a float32 copy of the model, computed in float32, predict the same."""
FLOORS = 2.0

BLOCK = 128
FOR_ROWS = {"data_type": "fp", "group_size": -1, "act_data_type": "fp", "act_group_size": -1}

MODELS = [Path(p) for p in os.environ.get("PEER_MODELS", str(DEMO)).split(os.pathsep)]

TEXT = """Green plants turn light into chemical energy, which they keep as sugar. Nearly all life depends on
this: most of the oxygen in the air comes from it, and what animals eat has grown by it in the end."""
"""What models were trained on: tokens of no language make a real one's predictions chaotic."""

CASES = [(name, "bfloat16") for name in SCHEMES] + [(name, "float32") for name in DIVIDES_IN_DTYPE]
"""Scheme, and dtype of the model and of the computation."""


@dataclass(frozen=True)
class Made:
    """One scheme on one model.

    Attributes:
        folders: format -> folder.
        ids: tokens of the text.
        in_memory: logits of the model in memory, in its dtype, `[tokens, vocabulary]`.
        floor: divergence of these from what the same weights and inputs predict in float32.
    """

    folders: Mapping[str, Path]
    ids: list[int]
    in_memory: Tensor
    floor: float


@torch.inference_mode()
def in_memory(model: Path, result: Result, ids: list[int], dtype: str) -> Tensor:
    """Logits of the dense rounded model, the first folder, whose inputs are rounded as planned."""
    with FolderSource.open(model) as source:
        planned = activation_formats(result.plan, source.layers)
    formats = InputRanges.from_entries(result.report["blocks"]).formats(planned)
    dense = AutoModelForCausalLM.from_pretrained(result.folders[0], dtype=getattr(torch, dtype)).eval()
    with quantized_inputs(dense, formats):
        logits: Tensor = dense(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].float()


def tokens(model: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    return ids


def options(model: Path, name: str) -> dict[str, Any]:
    """Options of one scheme, rounded plainly; layers that blocks do not divide have steps of rows."""
    common = {"group_size": None, "iters": 0, "disable_opt_rtn": True, "nsamples": 2, "seqlen": 64}
    found = {**common, "verify": False, "dataset": token_rows(3, 64), **SCHEMES[name]}
    if name == "FP8_BLOCK":
        with FolderSource.open(model) as source:
            uneven = [x.name for x in source.layers if x.block is not None and x.shape[1] % BLOCK]
        found["layer_config"] = dict.fromkeys(uneven, FOR_ROWS)
    return found


def make(model: Path, out: Path, name: str, dtype: str) -> Made:
    formats = ("fake", *(FORMATS if dtype == "bfloat16" else FORMATS[:1]))
    result = quantize(model, out, format=",".join(formats), **options(model, name))
    ids = tokens(model)
    exact = in_memory(model, result, ids, "float32")
    logits = in_memory(model, result, ids, dtype)
    shutil.rmtree(result.folders[0])
    return Made(dict(zip(formats, result.folders, strict=True)), ids, logits, divergence(exact, logits))


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.name)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Made]]:
    COMPRESSED_TENSORS.python()
    scratch = tmp_path_factory.mktemp(request.param.name)
    copy = scratch / "float32"
    AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32).save_pretrained(copy)
    AutoTokenizer.from_pretrained(request.param).save_pretrained(copy)
    models = {"bfloat16": request.param, "float32": copy}
    yield {case: make(models[case[1]], scratch / "-".join(case), *case) for case in CASES}
    shutil.rmtree(scratch)  # gigabytes where the model is a real one


@pytest.fixture(scope="module")
def read(
    made: dict[tuple[str, str], Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Answer]:
    """What the other process says of all `llm_compressor` folders."""
    questions = {
        "-".join(case): Question(found.folders["llm_compressor"], {}, case[1]) for case, found in made.items()
    }
    ids, scratch = next(iter(made.values())).ids, tmp_path_factory.mktemp("asked")
    answers = ask(COMPRESSED_TENSORS, "load_with_compressed_tensors.py", ids, 1, questions, scratch)
    return dict(zip(made, answers.values(), strict=True))


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Mean KL of rows of logits, nats per token."""
    p, q = (x.double().log_softmax(-1) for x in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_transformers_with_compressed_tensors(
    made: dict[tuple[str, str], Made],
    read: dict[tuple[str, str], Answer],
    case: tuple[str, str],
    record_property: Callable[[str, object], None],
) -> None:
    answer, expected = read[case], made[case]
    assert answer.error is None, answer.error
    coarse = case[0] in DIVIDES_IN_DTYPE and case[1] == "bfloat16"
    bound = max(COARSE, FLOORS * expected.floor) if coarse else EXACT
    found = divergence(expected.in_memory, answer.logits[0])
    record_property("divergence and bound", (found, bound))
    assert found < bound


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_with_this_package(
    made: dict[tuple[str, str], Made],
    name: str,
    backend: str,
    record_property: Callable[[str, object], None],
) -> None:
    """The reference is exact; other kernels round less, or add in another order, in bfloat16."""
    expected, config = made[name, "bfloat16"], AutoRoundConfig(backend=backend)
    options = {"dtype": torch.bfloat16, "quantization_config": config}
    found = divergence(
        expected.in_memory, logits_of(expected.folders["auto_round"], expected.ids, **options)[0]
    )
    bound = EXACT if backend == "torch" else max(COARSE, FLOORS * expected.floor)
    record_property("divergence and bound", (found, bound))
    assert found < bound
