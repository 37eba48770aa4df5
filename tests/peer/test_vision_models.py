"""Transformers with compressed-tensors answers texts with our folders of models that read images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.config import build_options
from auto_round.models.auto_classes import load_model
from auto_round.pipeline.quantize import run
from export.gguf.test_language_models import SHORT, save
from peer.peers import COMPRESSED_TENSORS, Question, ask
from peer.test_llama_cpp_language_models import IDS, NAMES

pytestmark = pytest.mark.peer

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Name -> the folder of dequantized weights, and what the peer made of the packed one."""
    COMPRESSED_TENSORS.python()
    root = tmp_path_factory.mktemp("vision")
    fake, questions = {}, {}
    for name in NAMES:
        model, out = save(name, root / name / "model"), root / name / "out"
        given = {"format": "llm_compressor,fake", "scheme": "W4A16", "group_size": 32, **SHORT}
        result = run(build_options({"model": str(model), "output_dir": str(out), **given}))
        packed, fake[name] = result.folders
        questions[name] = Question(packed, {}, dtype="float32")
    read = ask(
        COMPRESSED_TENSORS, "load_with_compressed_tensors.py", IDS, NEW_TOKENS, questions, root / "asked"
    )
    return {name: (fake[name], read[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_text_answers(name: str, answers: dict[str, tuple[Path, Any]]) -> None:
    folder, answer = answers[name]
    assert answer.error is None, answer.error
    model = load_model(folder, trust_remote_code=False, dtype=torch.float32).eval()
    ids = torch.tensor([IDS])
    torch.testing.assert_close(answer.logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    wanted = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert answer.generated.tolist() == wanted[0, len(IDS) :].tolist()
