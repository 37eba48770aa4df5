"""Files of llama.cpp's converter as templates, for architectures that our table of families lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from auto_round.config import build_options
from auto_round.errors import UnsupportedError
from auto_round.pipeline.quantize import run
from auto_round.testing.tiny_models import tiny_model
from export.gguf.small_models import VOCABULARY, byte_level_tokenizer, sentencepiece_tokenizer
from peer.peers import DRIVERS, SECONDS, Peer

pytestmark = pytest.mark.peer
gguf = pytest.importorskip("gguf")

LLAMA_CPP = Peer("PEER_LLAMA_CPP", "llama-cpp-python and gguf")
SOURCE = "PEER_LLAMA_CPP_SOURCE"
IDS = [5, 60, 261, 72, 90, 14, 258, 33, 101, 7, 44, 262, 80, 19, 3, 66]
LARGEST_KL = 0.05
"""Most divergence of 8 bits from 16, nats per token; rows out of order give more than 1."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "starcoder2": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma4_text": {
        "vocab_size": len(sentencepiece_tokenizer()),
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "enable_moe_block": True,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
    },
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 128,
    },
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""Biases and a tied head; queries, keys and values woven together; stacked experts; experts that are one
tensor in the checkpoint, too, as `[out, in]` (Gemma 4, Granite) and as `[in, out]` with rows in turn; a
convolution; a matrix that is cut in two, one half transposed."""


def _save(family: str, folder: Path) -> Path:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    tiny_model(config).save_pretrained(folder)
    tokenizer = sentencepiece_tokenizer() if family.startswith("gemma") else byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> model folder and the converter's file."""
    LLAMA_CPP.python()
    source = os.environ.get(SOURCE)
    if not source:
        pytest.skip(f"{SOURCE} names no folder with convert_hf_to_gguf.py (see tests/peer/README.md)")
    root = tmp_path_factory.mktemp("templates")
    found = {f: (_save(f, root / f / "model"), root / f / "template.gguf") for f in FAMILIES}
    request = {
        "source": source,
        "jobs": [{"model": str(model), "out": str(out)} for model, out in found.values()],
    }
    (root / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, str(DRIVERS / "convert_with_llama_cpp.py"), str(root / "request.json")],
        timeout=SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return found


def _run(model: Path, out: Path, form: str, **given: Any) -> Path:
    options = {"model": str(model), "output_dir": str(out), "format": form, "iters": 0, "device_map": "cpu"}
    run(build_options({**options, "disable_opt_rtn": True, **given}))
    (file,) = out.glob("*.gguf")
    return file


def _stored(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bits_come_out_as_they_went_in(
    family: str, templates: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Every row is found in the checkpoint and written where the converter has it, byte for byte."""
    model, template = templates[family]
    file = _run(model, tmp_path / "out", "gguf:f16", gguf_template=str(template))
    assert _stored(file) == _stored(template)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_predicts_what_the_template_predicts(
    family: str, templates: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, template = templates[family]
    with pytest.raises(UnsupportedError, match="gguf_template"):
        _run(model, tmp_path / "without", "gguf:q8_0")
    file = _run(model, tmp_path / "out", "gguf:q8_0", gguf_template=str(template))
    jobs = [
        {"file": str(path), "ids": IDS, "texts": [], "new_tokens": 4, "out": str(tmp_path / name)}
        for name, path in (("template", template), ("ours", file))
    ]
    LLAMA_CPP.run("load_with_llama_cpp.py", {"jobs": jobs}, tmp_path)
    first, second = (_log_probabilities(tmp_path / name) for name in ("template", "ours"))
    assert 0 < float((first.exp() * (first - second)).sum(-1).mean()) < LARGEST_KL
    assert json.loads((tmp_path / "ours" / "facts.json").read_text())["generated"]


def _log_probabilities(answer: Path) -> Tensor:
    return torch.from_numpy(np.load(answer / "logits.npy")).double().log_softmax(-1)
