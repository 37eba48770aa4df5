"""Load GGUF files with llama.cpp: tokens of texts, logits of prompts, a greedy continuation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama


def ask(job: dict[str, Any]) -> None:
    """Answer one job into its folder: `logits.npy` and `facts.json`."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    ids = job["ids"]
    model = Llama(
        job["file"], n_ctx=max(64, len(ids)), n_batch=64, logits_all=True, n_threads=1, verbose=False
    )
    model.eval(ids)
    np.save(out / "logits.npy", np.array(model.scores[: len(ids)], dtype=np.float32))
    tokens = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    model.reset()
    generated: list[int] = []
    for token in model.generate(ids[:8], temp=0.0):
        generated.append(int(token))
        if len(generated) == job["new_tokens"]:
            break
    facts = {"tokens": tokens, "generated": generated, "metadata": dict(model.metadata)}
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        ask(one)
