"""Nothing depends on PyTorch's default dtype and device, which belong to the user."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import auto_round
from auto_round import AutoRoundConfig
from auto_round.testing.tiny_models import save_tiny_model
from export.gguf.small_models import save_small_model
from pipeline.runs import SIZES, quantize, tree

ROOT = Path(auto_round.__file__).parent

WHOLE = frozenset({"arange", "randint", "randperm", "as_tensor", "tril_indices", "triu_indices"})
"""Functions whose numbers have a dtype of their own: that of what they are given, or int64."""
MAKERS = WHOLE | {
    *("empty", "zeros", "ones", "full", "eye", "linspace", "logspace", "rand", "randn"),
    *("tensor", "scalar_tensor", "asarray", "empty_strided"),
}
"""Functions of `torch` that make a tensor where the user's defaults say, unless they are told."""


def careless(tree: ast.AST) -> Iterator[int]:
    """Lines where a tensor is made without a word on its device or dtype."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if isinstance(owner, ast.Name) and owner.id == "torch" and name in MAKERS:
            told = {keyword.arg for keyword in node.keywords}
            if not told >= ({"device"} if name in WHOLE else {"device", "dtype"}):
                yield node.lineno


@pytest.mark.parametrize("text", ["torch.empty(3)", "torch.tensor(x, dtype=d)", "torch.arange(3, dtype=d)"])
def test_carelessness_is_noticed(text: str) -> None:
    assert list(careless(ast.parse(text))) == [1]


def test_every_tensor_is_made_with_its_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(ROOT.rglob("*.py"))
        if "testing" not in path.parts
        for line in careless(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


PATHS = {
    "tuned": {"enable_alg_ext": True, "bits": 3},
    "searched": {"iters": 0, "sym": False, "format": "auto_round,auto_gptq"},
    "plain": {"iters": 0, "disable_opt_rtn": True, "format": "auto_awq"},
    "activations": {"iters": 1, "scheme": "INT8_W8A8", "group_size": -1, "format": "llm_compressor"},
    "gguf": {"iters": 0, "group_size": None, "format": "gguf:q4_k_m"},
}
"""What a run is asked for: together they use every C program and every kind of search and of packing."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wide = save_tiny_model("llama", folder / "llama", **SIZES)
    return dict.fromkeys(PATHS, wide) | {"gguf": save_small_model("llama", folder / "gguf")}


@pytest.fixture(scope="module")
def usual(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that the paths write while PyTorch's defaults are its own."""
    folder = tmp_path_factory.mktemp("usual")
    for name, given in PATHS.items():
        quantize(models[name], folder / name, amp=False, **given)
    return {name: folder / name for name in PATHS}


@pytest.fixture(params=[pytest.param("float64", marks=pytest.mark.slow), "bfloat16", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """A default dtype or device of the user: on `meta` no tensor has numbers."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.usefixtures("defaults")
def test_runs_write_the_same_weights(
    name: str, models: dict[str, Path], usual: dict[str, Path], tmp_path: Path
) -> None:
    quantize(models[name], tmp_path / name, amp=False, **PATHS[name])
    wanted, found = (
        {file: data for file, data in tree(folder).items() if file.endswith((".safetensors", ".gguf"))}
        for folder in (usual[name], tmp_path / name)
    )
    assert found
    assert found == wanted


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.usefixtures("defaults")
def test_folders_load_and_predict(backend: str, usual: dict[str, Path]) -> None:
    if torch.get_default_device().type == "meta":
        torch.set_default_device(None)  # Transformers itself loads nothing onto it
    config = AutoRoundConfig(backend=backend)
    ids = torch.arange(3, 13, device="cpu").unsqueeze(0)

    def logits() -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(
            usual["tuned"], dtype=torch.float32, device_map="cpu", quantization_config=config
        )
        found: Tensor = model(ids).logits
        return found

    found = logits()
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, logits())
