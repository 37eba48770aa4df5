from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.calibration.python_docs import PythonDocs
from auto_round.calibration.rows import load_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "demo-model"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the examples are not part of this installation")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", EXAMPLES / "train_demo_model.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up by name
    spec.loader.exec_module(made)
    return made


def test_its_size_and_widths() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[name] % 128 == 0
    for name in ("num_attention_heads", "num_key_value_heads"):
        assert config[name] * config["head_dim"] % 128 == 0


def test_its_page_states_the_defaults_of_the_script(script: ModuleType) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    assert json.loads(shown.group(1)) == asdict(script.Recipe())


def test_it_predicts_documentation_that_it_never_saw(script: ModuleType) -> None:
    recipe = script.Recipe()
    _, held_out = script.split_documents(PythonDocs()[:], recipe.held_out_every)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    stream = script.encode(tokenizer, held_out[:10])[: 4 * recipe.seqlen]
    assert script.perplexity(model, stream, recipe) < 40  # of 2048 tokens; 1000 and more without training


def test_calibration_rows_for_it_need_nothing_else() -> None:
    found = load_rows("python-docs", AutoTokenizer.from_pretrained(FOLDER), nsamples=8, seqlen=512, seed=42)
    assert len(found.rows) == 8
    assert int(torch.stack([row.tokens for row in found.rows]).max()) < 2048
