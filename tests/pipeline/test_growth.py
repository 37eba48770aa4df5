"""Planning takes work in proportion to the number of layers: a mixture of experts has 20,000 of them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import auto_round
from auto_round.config import build_options
from auto_round.models import assembled
from auto_round.models.roles import find_head
from auto_round.pipeline.deciding.plan_table import manifests, plan_table
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.writing.signature import signature
from auto_round.testing.tiny_models import save_tiny_model
from export.gguf.small_models import byte_level_tokenizer

ROOT = str(Path(auto_round.__file__).parent)
FEW, MANY = 4, 12
GIVEN = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
WIDE = {"bits": 4, "group_size": 32}
EIGHT: dict[str, Any] = {
    "gguf:q4_k_m": "GGUF:Q8_0",
    "auto_awq": {"bits": 16},
    "llm_compressor": {"bits": 4},  # Transformers unpacks experts by one scheme
}


def lines_executed(act: Callable[[], object]) -> Counter[str]:
    """How often lines of each function of the package are executed; a count, as no test measures time."""
    counts: Counter[str] = Counter()

    def in_function(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            counts[
                f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_code.co_firstlineno}"
            ] += 1
        return in_function

    def on_call(frame: FrameType, event: str, arg: object) -> Any:
        ours = frame.f_code.co_filename.startswith(ROOT) or frame.f_code.co_name == "named_modules"
        return in_function if ours else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        act()
    finally:
        sys.settrace(before)
    return counts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 320}
    folder = tmp_path_factory.mktemp("growth")
    return {
        n: save_tiny_model("qwen3_moe", folder / str(n), num_experts=n, norm_topk_prob=True, **sizes)
        for n in (FEW, MANY)
    }


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "gguf:q4_k_m"])
def test_planning_grows_as_the_layers_do(fmt: str, models: dict[int, Path], tmp_path: Path) -> None:
    def plan(experts: int) -> None:
        step = 1 if fmt.startswith("gguf") else 2  # the experts of a GGUF file are one tensor
        named = [
            f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in (0, 1) for e in range(0, experts, step)
        ]
        rules = {name: EIGHT.get(fmt, {"bits": 8}) for name in named}
        scheme = {} if fmt.startswith("gguf") else WIDE
        job = prepare(
            build_options(
                {**GIVEN, **scheme, "model": str(models[experts]), "format": fmt, "layer_config": rules}
            ),
            tokenizer=byte_level_tokenizer(),
            rows=False,
        )
        plan_table(job)
        manifests(job)
        signature(job)

    few, many = (lines_executed(lambda n=n: plan(n)) for n in (FEW, MANY))
    worse = {
        name: (few[name], count)
        for name, count in many.items()
        if count > 300 and count > 1.15 * MANY / FEW * max(few[name], 1)
    }
    assert not worse


def test_the_modules_are_not_walked_through_for_each_layer(
    models: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = []
    monkeypatch.setattr(assembled, "find_head", lambda model: walks.append(model) or find_head(model))
    given = {**GIVEN, "model": str(models[MANY]), "format": "gguf:q4_k_m"}
    prepare(build_options(given), tokenizer=byte_level_tokenizer(), rows=False)
    assert len(walks) <= 2
