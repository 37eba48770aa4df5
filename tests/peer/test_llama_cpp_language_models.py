"""llama.cpp reads the language model of a model that reads images, and predicts what Transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from auto_round.config import build_options
from auto_round.models.auto_classes import load_model
from auto_round.pipeline.quantize import run
from export.gguf.test_language_models import save
from peer.peers import Peer

pytestmark = pytest.mark.peer
pytest.importorskip("gguf")

LLAMA_CPP = Peer("PEER_LLAMA_CPP", "llama-cpp-python and gguf")
IDS = [5, 60, 261, 72, 90, 14, 258, 33, 71, 7, 44, 262, 80, 19, 3, 66]
NAMES = ("llava", "idefics3", "mistral3", "internvl", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("name", NAMES)
def test_text_alone(name: str, tmp_path: Path) -> None:
    LLAMA_CPP.python()
    model = save(name, tmp_path / "model")
    plain = {"iters": 0, "disable_opt_rtn": True, "format": "gguf:f16", "output_dir": str(tmp_path / "out")}
    run(build_options({"model": str(model), **plain}))
    (file,) = (tmp_path / "out").glob("*.gguf")
    answer = tmp_path / "answer"
    job = {"file": str(file), "ids": IDS, "texts": [], "new_tokens": 2, "out": str(answer)}
    LLAMA_CPP.run("load_with_llama_cpp.py", {"jobs": [job]}, tmp_path)
    whole = load_model(model, trust_remote_code=False, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = whole(input_ids=torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    theirs = torch.from_numpy(np.load(answer / "logits.npy")).double().log_softmax(-1)
    assert float((wanted.exp() * (wanted - theirs)).sum(-1).mean()) < 1e-5
