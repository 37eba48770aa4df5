"""GGUF files by llama.cpp: which rows are asked for, and which of its numbers are taken."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from auto_round.errors import CheckpointError
from auto_round.evaluate.llama_cpp import LlamaCppPredictor

VOCABULARY = 11


class Llama:
    """Predicts by a table of the token before, and keeps numbers of the last row as the binding does."""

    table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)

    def __init__(self, path: str, **given: Any) -> None:
        if "broken" in path:
            raise ValueError("Failed to load model from file")
        self.given = given
        self.scores = np.full((given["n_ctx"], VOCABULARY), 99, dtype=np.float32)
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def eval(self, tokens: list[int]) -> None:
        for token in tokens:
            self.scores[self.count] = self.table[token]
            self.count += 1


@pytest.fixture
def llama(monkeypatch):
    module = ModuleType("llama_cpp")
    vars(module)["Llama"] = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)


def test_logits_of_each_row(llama, tmp_path):
    rows = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    predictor = LlamaCppPredictor(tmp_path / "a.gguf", 7, 2)
    found = predictor.logits(rows)
    assert torch.equal(found, torch.from_numpy(Llama.table)[rows[:, :-1]])
    assert predictor._model.given["n_ctx"] == 64
    assert predictor._model.given["n_batch"] == predictor._model.given["n_ubatch"] == 7


def test_a_file_that_it_does_not_load(llama, tmp_path):
    with pytest.raises(CheckpointError, match="does not load it: Failed"):
        LlamaCppPredictor(tmp_path / "broken.gguf", 7, 2)
