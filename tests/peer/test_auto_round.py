"""The other auto-round (0.16.1) reads our folders, and we read its."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.calibration.python_docs import PythonDocs
from peer.drivers.recording import weight_of
from peer.ours import (
    IDS,
    LOGITS_ROUNDOFFS,
    NEW_TOKENS,
    UNIT_ROUNDOFF,
    Made,
    check_answer,
    check_weights,
    logits_of,
    make,
)
from peer.peers import AUTO_ROUND, Answer, Question, ask

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore:You passed `quantization_config`")]

LOADER = "load_with_transformers.py"
GPTQ, PLAIN, AWQ = "auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq"
OTHER_WIDTHS = {
    "layer_config": {"down_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"group_size": 32}},
    "ignore_layers": "layers.0.self_attn.q_proj,o_proj",
}

PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "w2": ({"bits": 2, "group_size": 32}, ("auto_round", GPTQ, PLAIN)),
    "w3": ({"bits": 3}, ("auto_round", GPTQ, PLAIN)),
    "w4": ({"bits": 4}, ("auto_round", GPTQ, PLAIN, AWQ)),
    "w8": ({"bits": 8, "group_size": -1}, ("auto_round", GPTQ, PLAIN)),
    "w2-asym": ({"bits": 2, "group_size": 64, "sym": False}, ("auto_round", PLAIN)),
    "w3-asym": ({"bits": 3, "group_size": 32, "sym": False}, ("auto_round", PLAIN)),
    "w4-asym": ({"bits": 4, "group_size": 32, "sym": False}, ("auto_round", PLAIN, AWQ)),
    "w8-asym": ({"bits": 8, "sym": False}, ("auto_round", PLAIN)),
    "w4-mixed": ({"bits": 4, **OTHER_WIDTHS}, ("auto_round", PLAIN)),
    "w4-head": ({"bits": 4, "quant_lm_head": True}, ("auto_round",)),
    "w4-biases": ({"bits": 4}, ("auto_round", PLAIN)),
}
"""Plan -> options of the quantizer, formats."""

READ = [(plan, fmt) for plan, (_, formats) in PLANS.items() for fmt in formats]


def _is_awq(plan: str, fmt: str) -> bool:
    return fmt == AWQ or (plan == "w4-asym" and fmt == "auto_round")


@dataclass(frozen=True)
class Ours:
    """What we made, and what the peer made of it by `(plan, format)`."""

    made: dict[str, Made]
    read: dict[tuple[str, str], Answer]


@pytest.fixture(scope="module")
def ours(demo: Path, biased: Path, tmp_path_factory: pytest.TempPathFactory) -> Ours:
    AUTO_ROUND.python()
    scratch = tmp_path_factory.mktemp("ours")
    made = {
        plan: make(biased if plan == "w4-biases" else demo, scratch / plan, formats, **options)
        for plan, (options, formats) in PLANS.items()
    }
    questions = {
        f"{plan}-{fmt}": made[plan].question(fmt, backend="auto" if _is_awq(plan, fmt) else "torch")
        for plan, fmt in READ
    }
    answers = ask(AUTO_ROUND, LOADER, IDS, NEW_TOKENS, questions, scratch / "asked")
    return Ours(made, {(plan, fmt): answers[f"{plan}-{fmt}"] for plan, fmt in READ})


@pytest.mark.parametrize(("plan", "fmt"), READ)
def test_it_reads_ours(ours: Ours, plan: str, fmt: str) -> None:
    of_row = 0.0
    if _is_awq(plan, fmt):
        if not AUTO_ROUND.has("auto_round_kernel"):
            pytest.skip("auto-round 0.16.1 needs auto-round-lib to read AWQ packing on a CPU")
        of_row = 4.0
    check_answer(ours.read[plan, fmt], ours.made[plan], of_row=of_row)


ROWS = {"nsamples": 8, "seqlen": 64, "batch_size": 4}
NEAREST = {"iters": 0, "disable_opt_rtn": True, **ROWS}
TUNED = {"iters": 8, **ROWS}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "w2": ("auto_round", {"bits": 2, "group_size": 32, "sym": True, **NEAREST}),
    "w2-asym": ("auto_round", {"bits": 2, "group_size": 32, "sym": False, **NEAREST}),
    "w3-asym": (PLAIN, {"bits": 3, "group_size": 128, "sym": False, **NEAREST}),
    "w4": ("auto_round", {"bits": 4, "group_size": 128, "sym": True, **NEAREST}),
    "w4-tuned": ("auto_round", {"bits": 4, "group_size": 32, "sym": True, **TUNED}),
    "w4-asym-tuned": (PLAIN, {"bits": 4, "group_size": 32, "sym": False, **TUNED}),
    "w4-awq": (AWQ, {"bits": 4, "group_size": 32, "sym": False, **NEAREST}),
    "w8": (GPTQ, {"bits": 8, "group_size": -1, "sym": True, **NEAREST}),
    "gptq": ("auto_gptq", {"bits": 4, "group_size": 128, "sym": True, **NEAREST}),
    "awq": ("auto_awq", {"bits": 4, "group_size": 128, "sym": False, **NEAREST}),
}
"""What the peer quantizes: format and arguments of its class."""


@dataclass(frozen=True)
class Theirs:
    """What the peer made, and what it makes of that itself."""

    folders: dict[str, Path]
    errors: dict[str, str]
    read: dict[str, Answer]


@pytest.fixture(scope="module")
def theirs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    AUTO_ROUND.python()
    scratch = tmp_path_factory.mktemp("theirs")
    texts = scratch / "texts.jsonl"
    docs = PythonDocs()
    long = [text for text in islice(docs, 200) if len(text) > 1000][:32]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))
    jobs = [
        {
            "model": str(demo),
            "folder": str(scratch / n),
            "format": fmt,
            "arguments": {**given, "dataset": str(texts)},
        }
        for n, (fmt, given) in THEIRS.items()
    ]
    AUTO_ROUND.run("quantize_with_auto_round.py", {"jobs": jobs}, scratch / "made")
    facts = {name: json.loads((scratch / f"{name}.json").read_text()) for name in THEIRS}
    errors = {name: fact["error"] for name, fact in facts.items() if "error" in fact}
    folders = {name: Path(fact["folder"]) for name, fact in facts.items() if "folder" in fact}
    layers = {n: list(w.shape) for n, w in load_file(demo / "model.safetensors").items() if "_proj." in n}
    layers = {name.removesuffix(".weight"): shape for name, shape in layers.items()}
    kernels = {name: "auto" if "awq" in name else "torch" for name in THEIRS}
    questions = {n: Question(f, layers, backend=kernels[n]) for n, f in folders.items()}
    return Theirs(folders, errors, ask(AUTO_ROUND, LOADER, IDS, NEW_TOKENS, questions, scratch / "asked"))


def our_weights(folder: Path, answer: Answer) -> Mapping[str, Tensor]:
    """Weights of a folder as we read it, exact."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
    )
    modules = dict(model.named_modules())
    with torch.inference_mode():
        return {n: weight_of(modules[n], list(w.shape), torch.float32)[0] for n, w in answer.weights.items()}


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_its(theirs: Theirs, name: str) -> None:
    assert name not in theirs.errors, theirs.errors[name]
    if "awq" in name and not AUTO_ROUND.has("auto_round_kernel"):
        pytest.skip("auto-round 0.16.1 needs auto-round-lib to read AWQ packing on a CPU")
    answer, folder = theirs.read[name], theirs.folders[name]
    assert answer.error is None, answer.error
    check_weights(answer, our_weights(folder, answer), of_row=4.0 if "awq" in name else 0.0)
    got = logits_of(
        folder, dtype=getattr(torch, answer.dtype), quantization_config=AutoRoundConfig(backend="torch")
    )
    bound = LOGITS_ROUNDOFFS * UNIT_ROUNDOFF[answer.dtype] * got.abs().max()
    assert (got - answer.logits).abs().max() <= bound
