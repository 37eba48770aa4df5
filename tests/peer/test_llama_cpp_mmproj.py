"""llama.cpp encodes a picture with an mmproj file as Transformers does with the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from auto_round.config import build_options
from auto_round.models.auto_classes import load_model
from auto_round.pipeline.quantize import run
from export.gguf.test_language_models import SHORT, save
from peer.peers import Peer

pytestmark = pytest.mark.peer
pytest.importorskip("gguf")

LLAMA_CPP = Peer("PEER_LLAMA_CPP", "llama-cpp-python and gguf")
MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.5, 1.0]
LARGEST_ERROR = {"f16": 2e-3, "q8_0": 3e-2}
"""Of the states, as a share of their size: llama.cpp computes with weights and activations of that width."""


@pytest.mark.parametrize("kind", LARGEST_ERROR)
@pytest.mark.parametrize("name", ["gemma3", "idefics3", "smolvlm"])
def test_pictures(name: str, kind: str, tmp_path: Path) -> None:
    LLAMA_CPP.python()
    model, out = save(name, tmp_path / "model"), tmp_path / "out"
    side = json.loads((model / "config.json").read_text())["vision_config"]["image_size"]
    told = {"image_mean": MEAN, "image_std": STD, "size": {"longest_edge": side}}
    (model / "preprocessor_config.json").write_text(json.dumps(told))
    given = {"model": str(model), "output_dir": str(out), "format": "gguf:f16", "mmproj": kind, **SHORT}
    run(build_options(given))
    (beside,) = out.glob("mmproj-*.gguf")
    (file,) = set(out.glob("*.gguf")) - {beside}
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", picture)
    job = {"file": file, "mmproj": beside, "picture": tmp_path / "picture.npy", "out": tmp_path / "out.npy"}
    jobs = [{key: str(path) for key, path in job.items()}]
    LLAMA_CPP.run("see_with_llama_cpp.py", {"jobs": jobs}, tmp_path / "asked")
    pixels = (torch.from_numpy(picture).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = pixels.permute(2, 0, 1)[None]
    whole = load_model(model, trust_remote_code=False, dtype=torch.float32).eval()
    with torch.no_grad():
        found = whole.get_image_features(pixel_values=pixels if name == "gemma3" else pixels[None])
    wanted = torch.cat(list(found.pooler_output)).flatten(0, -2)
    theirs = torch.from_numpy(np.load(tmp_path / "out.npy")).reshape(-1, *wanted.shape)
    for states in theirs:  # Idefics: one tile, and the picture as a whole
        assert float((states - wanted).norm() / wanted.norm()) < LARGEST_ERROR[kind]
