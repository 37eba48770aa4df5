"""llama.cpp chooses the types that our mixtures choose, and reads our GGUF files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from auto_round.config import build_options
from auto_round.export.gguf.imatrix import Importances, read_imatrix, write_imatrix
from auto_round.pipeline.quantize import run
from auto_round.schemes.gguf_types import FILE_TYPES
from export.gguf.reread import reread
from export.gguf.small_models import FAMILIES, save_small_model, sentencepiece_tokenizer
from peer.peers import Peer
from schemes.gguf_models import FILES, MODELS, condensed, stored_tables

pytestmark = pytest.mark.peer
gguf = pytest.importorskip("gguf")

LLAMA_CPP = Peer("PEER_LLAMA_CPP", "llama-cpp-python and gguf")
IDS = [5, 60, 261, 72, 90, 14, 258, 33, 101, 7, 44, 262, 80, 19, 3, 66]
TEXTS = ["the then  12 in\n\nan", "I've 3.5 she'll!", "tab\tand \u00e9moji \U0001f680"]
NEW_TOKENS = 8
LARGEST_KL = {"gguf:f16": 1e-5, "gguf:bf16": 5e-4}
"""Most divergence, nats per token: arithmetic in another order, and activations rounded to bfloat16."""
KL_ACTIVATIONS = 5e-3
"""Most divergence for blocks: llama.cpp rounds activations to 8 bits before it multiplies."""


def test_tables_are_what_the_quantizer_chooses(tmp_path: Path) -> None:
    LLAMA_CPP.run(
        "gguf_tables.py", {"models": MODELS, "files": FILES, "out": str(tmp_path / "tables.json")}, tmp_path
    )
    answered: dict[str, dict[str, dict[str, str]]] = json.loads((tmp_path / "tables.json").read_text())
    found = {
        model: {file: condensed(types, list(MODELS[model]["tensors"])) for file, types in files.items()}
        for model, files in answered.items()
    }
    assert found == stored_tables()


@dataclass(frozen=True)
class Case:
    """One file and what is known of it."""

    model: Path
    file: Path
    form: str


def _options(family: str, form: str) -> dict[str, Any]:
    wide = {"hidden_size": 256, "intermediate_size": 256}
    if family == "gpt2":
        wide = {"n_embd": 256}
    plain = form == "gguf:f16"
    return (
        {} if plain else wide | ({"head_dim": 64, "query_pre_attn_scalar": 64} if "gemma" in family else {})
    )


CASES = [
    *((family, "gguf:f16") for family in sorted(FAMILIES)),
    *(("llama", f"gguf:{name}") for name in FILE_TYPES if name not in ("f16",)),
    ("qwen3_moe", "gguf:q4_k_m"),
    ("qwen3_moe", "gguf:mxfp4_moe"),
    ("qwen3_moe", "gguf:nvfp4"),
    ("qwen3", "gguf:nvfp4"),
    ("gpt2", "gguf:q4_k_m"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Case, Path]]:
    LLAMA_CPP.python()
    root = tmp_path_factory.mktemp("llama_cpp")
    found, jobs = {}, []
    for number, (family, form) in enumerate(CASES):
        model = save_small_model(family, root / f"{number}" / "model", **_options(family, form))
        out = root / f"{number}" / "out"
        run(
            build_options(
                {
                    "model": str(model),
                    "format": form,
                    "output_dir": str(out),
                    "iters": 0,
                    "disable_opt_rtn": True,
                }
            )
        )
        (file,) = out.glob("*.gguf")
        answer = root / f"{number}" / "answer"
        found[family, form] = (Case(model, file, form), answer)
        jobs.append(
            {"file": str(file), "ids": IDS, "texts": TEXTS, "new_tokens": NEW_TOKENS, "out": str(answer)}
        )
    LLAMA_CPP.run("load_with_llama_cpp.py", {"jobs": jobs}, root)
    return found


def _expected(case: Case) -> Tensor:
    """Logits with the weights that are in the file, dequantized by the `gguf` package."""
    with torch.no_grad():
        return reread(case.model, case.file)(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize(
    "key", CASES, ids=lambda key: f"{key[0]}-{key[1]}" if isinstance(key, tuple) else str(key)
)
def test_llama_cpp_predicts_what_the_weights_say(
    key: tuple[str, str], answers: dict[tuple[str, str], tuple[Case, Path]]
) -> None:
    case, answer = answers[key]
    ours = _expected(case).double().log_softmax(-1)
    theirs = torch.from_numpy(np.load(answer / "logits.npy")).double().log_softmax(-1)
    kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    assert kl < LARGEST_KL.get(key[1], KL_ACTIVATIONS)
    facts = json.loads((answer / "facts.json").read_text())
    assert len(facts["generated"]) <= NEW_TOKENS


@pytest.mark.parametrize("key", [("qwen2", "gguf:f16"), ("gpt2", "gguf:f16")], ids=str)
def test_llama_cpp_cuts_texts_alike(
    key: tuple[str, str], answers: dict[tuple[str, str], tuple[Case, Path]]
) -> None:
    from transformers import AutoTokenizer

    case, answer = answers[key]
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    facts = json.loads((answer / "facts.json").read_text())
    assert facts["tokens"] == [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


def test_sentencepiece_by_merges(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    model = save_small_model("llama", tmp_path / "model", tokenizer=tokenizer)
    run(build_options({"model": str(model), "format": "gguf:f16", "output_dir": str(tmp_path / "out")}))
    (file,) = (tmp_path / "out").glob("*.gguf")
    texts = ["the tan hint", "then the  an", "x\u00e9\n"]
    job = {"file": str(file), "ids": IDS, "texts": texts, "new_tokens": 2, "out": str(tmp_path / "answer")}
    LLAMA_CPP.run("load_with_llama_cpp.py", {"jobs": [job]}, tmp_path)
    facts = json.loads((tmp_path / "answer" / "facts.json").read_text())
    assert facts["tokens"] == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def _weighted_errors(file: Path, source: Path, importances: Importances) -> dict[str, float]:
    """Error of each matrix of a file against the 16-bit file, weighted by importances."""
    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found = {}
    for tensor in gguf.GGUFReader(source).tensors:
        if tensor.name in importances.rows:
            stored = there[tensor.name]
            error = gguf.quants.dequantize(stored.data, stored.tensor_type) - tensor.data.astype(np.float32)
            found[tensor.name] = float((error**2 * importances.rows[tensor.name].numpy()).sum())
    return found


def test_quantizer_takes_our_importances(tmp_path: Path) -> None:
    """Q2_K_S is refused unless every matrix of a block has importances of the right length."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = save_small_model("qwen3", tmp_path / "model", **sizes)
    rows = torch.randint(3, 250, (10, 32), generator=torch.Generator().manual_seed(2)).tolist()
    path = tmp_path / "imatrix.gguf"
    common = {"model": str(model), "iters": 0, "nsamples": 8, "seqlen": 32, "device_map": "cpu"}
    ours = {
        **common,
        "format": "gguf:q2_k_s",
        "output_dir": str(tmp_path / "ours"),
        "save_imatrix": str(path),
    }
    run(build_options(ours), dataset=rows)
    run(build_options({**common, "format": "gguf:f16", "output_dir": str(tmp_path / "f16")}))
    (source,) = (tmp_path / "f16").glob("*.gguf")
    whole = read_imatrix(path)
    ones = Importances({n: torch.ones_like(r) for n, r in whole.rows.items()}, whole.counts)
    fewer = {n: r for n, r in whole.rows.items() if n != "blk.1.ffn_up.weight"}
    write_imatrix(tmp_path / "ones.gguf", ones)
    write_imatrix(tmp_path / "fewer.gguf", Importances(fewer, whole.counts))
    jobs = [
        {"source": str(source), "target": str(tmp_path / f"{name}.out"), "imatrix": imatrix}
        | {"type": FILE_TYPES["q2_k_s"].number}
        for name, imatrix in (
            ("ours", str(path)),
            ("ones", str(tmp_path / "ones.gguf")),
            ("fewer", str(tmp_path / "fewer.gguf")),
            ("none", None),
        )
    ]
    request = {"jobs": jobs, "out": str(tmp_path / "codes.json")}
    LLAMA_CPP.run("quantize_with_llama_cpp.py", request, tmp_path)
    steered, flat, *incomplete = json.loads((tmp_path / "codes.json").read_text())
    assert steered == flat == 0
    assert all(incomplete), "one matrix without importances is enough to be refused"
    with_ours, with_ones = (
        _weighted_errors(tmp_path / f"{name}.out", source, whole) for name in ("ours", "ones")
    )
    assert all(with_ours[name] < with_ones[name] for name in with_ours)
