"""Perplexity and divergence as llama.cpp's own tool counts them, from its logits; nothing of ours takes part.

Rows of `n_ctx` tokens, of which the second half counts: tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama


def log_probabilities(model: Any, row: list[int], first: int) -> Any:
    """`[positions, vocabulary]` float64, of the tokens behind the first half of a row."""
    model.reset()
    model.eval(row)
    logits = np.array(model.scores[first : len(row) - 1], dtype=np.float64)[:, : model.n_vocab()]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of two files on a text."""
    length = request["n_ctx"]
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length}
    models = [Llama(f, logits_all=True, verbose=False, n_threads=1, **sizes) for f in request["files"]]
    tokens = models[0].tokenize(Path(request["text"]).read_bytes(), add_bos=False, special=False)
    count = min(len(tokens), request["tokens"]) // length
    rows = [tokens[i * length : (i + 1) * length] for i in range(count)]
    first = length // 2
    nll: list[list[float]] = [[], []]
    divergence: list[float] = []
    for row in rows:
        before, after = (log_probabilities(model, row, first) for model in models)
        following = np.array(row[first + 1 :])[:, None]
        for sums, found in zip(nll, (before, after), strict=True):
            sums.extend((-np.take_along_axis(found, following, 1)[:, 0]).tolist())
        divergence.extend((np.exp(before) * (before - after)).sum(-1).tolist())
    return {
        "positions": len(divergence),
        "perplexity": [float(np.exp(np.mean(sums))) for sums in nll],
        "kl": {
            "mean": float(np.mean(divergence)),
            "median": float(np.median(divergence)),
            "p99": float(np.quantile(divergence, 0.99)),
            "largest": max(divergence),
        },
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(asked["out"]).write_text(json.dumps(measure(asked)))
