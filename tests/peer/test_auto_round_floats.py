"""Floating `auto_round` folders with calibrated input scales: the other auto-round reads ours, we read its.

Predictions are compared, not weights: rounded inputs answer unit vectors with other numbers. Both sides round
last bits otherwise, and a code of 4 bits that flips is a whole step, so the bounds are those of flips.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round.calibration.python_docs import PythonDocs
from auto_round.inference.qlinear import QuantLinear
from auto_round.numerics.activation_float import MeasuredScales
from auto_round.numerics.presets_float import mx_format
from auto_round.numerics.scale_power import floor_rule
from peer.ours import DEMO, IDS, logits_of
from peer.peers import AUTO_ROUND, Answer, Question, ask
from pipeline.runs import quantize

pytestmark = pytest.mark.peer

BOUNDS = {"FP8_STATIC": 0.02, "NVFP4": 0.1}
"""Scheme -> most divergence between the two readers of one folder, nats per token."""
ELEMENTS = {"MXFP4": "fp4", "MXFP8": "fp8"}
"""Microscaling scheme -> its element."""
SAME = 1e-6
"""Most divergence in float32."""
PACKINGS = {"FP8_STATIC": "auto_round:fp8_static", "NVFP4": "auto_round:llm_compressor"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    pages = [page for page, _ in zip(PythonDocs(), range(40), strict=False)]
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    return path


def divergence(answer: Answer, logits: Tensor) -> float:
    """Of the peer's predictions from ours, nats per token."""
    assert answer.error is None, answer.error
    ours, theirs = (x.float().log_softmax(-1).flatten(0, -2) for x in (logits, answer.logits))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def _ours(folder: Path) -> Tensor:
    return logits_of(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("scheme", BOUNDS)
def test_it_reads_ours(tmp_path: Path, scheme: str) -> None:
    AUTO_ROUND.python()
    given: dict[str, Any] = {"group_size": None, "iters": 0, "disable_opt_rtn": True, "format": "auto_round"}
    (folder,) = quantize(DEMO, tmp_path / "ours", scheme=scheme, **given).folders
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["packing_format"] == PACKINGS[scheme]
    questions = {"ours": Question(folder, {}, "bfloat16")}
    answer = ask(AUTO_ROUND, "load_with_transformers.py", IDS, 1, questions, tmp_path / "asked")["ours"]
    assert divergence(answer, _ours(folder)) < BOUNDS[scheme]


@pytest.mark.parametrize("scheme", BOUNDS)
def test_we_read_its(tmp_path: Path, texts: Path, scheme: str) -> None:
    folder, answer = _made_by_it(scheme, "bfloat16", tmp_path, texts)
    assert divergence(answer, _ours(folder)) < BOUNDS[scheme]


@pytest.mark.parametrize("scheme", ELEMENTS)
def test_we_read_its_microscaling(tmp_path: Path, texts: Path, scheme: str) -> None:
    """Equal, once inputs get its powers of two: the floor rule of MX 1.0, under which extremes from 7 to 8
    steps of FP4 saturate. Ours are those of compressed-tensors (docs/LOG.md)."""
    folder, answer = _made_by_it(scheme, "float32", tmp_path, texts)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
    ).eval()
    fmt = mx_format(ELEMENTS[scheme])
    inputs = MeasuredScales(replace(fmt, rule=floor_rule(fmt.grid)))
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert module.spec.inputs == MeasuredScales(fmt)
            module.spec = replace(module.spec, inputs=inputs)
    assert divergence(answer, model(input_ids=torch.tensor([IDS])).logits.detach()) < SAME


def _made_by_it(scheme: str, dtype: str, tmp_path: Path, texts: Path) -> tuple[Path, Answer]:
    """A folder that the other one wrote, and what it predicts from it."""
    AUTO_ROUND.python()
    job = {
        "model": str(DEMO),
        "arguments": {"scheme": scheme, "iters": 0, "disable_opt_rtn": True, "dataset": str(texts)}
        | {"nsamples": 4, "seqlen": 32, "batch_size": 2},
        "format": "auto_round",
        "folder": str(tmp_path / "theirs"),
    }
    AUTO_ROUND.run("quantize_with_auto_round.py", {"jobs": [job]}, tmp_path / "made")
    made = json.loads((tmp_path / "theirs.json").read_text())
    assert "error" not in made, made
    folder = Path(made["folder"])
    questions = {"theirs": Question(folder, {}, dtype)}
    answers = ask(AUTO_ROUND, "load_with_transformers.py", IDS, 1, questions, tmp_path / "asked")
    return folder, answers["theirs"]
