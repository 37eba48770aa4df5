"""Which scheme vLLM finds for a module: its reader of `auto-round` configurations against ours."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from auto_round.consumers.fields import CannotReadError
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import fused_modules
from auto_round.consumers.readers import AutoRoundReader
from auto_round.stored.matrices import GPTQ, Matrix
from peer.test_vllm import PEER

pytestmark = pytest.mark.peer

ENDS = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    *(f"mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")),
]
NAMES = [f"model.layers.{block}.{end}" for block in (0, 1, 11) for end in ENDS] + ["lm_head"]
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

KEYS = [
    *NAMES,
    *(
        "model.layers.1.self_attn.qkv_proj",
        "layers.1.mlp.down_proj",
        "self_attn.q_proj",
        "down_proj",
        "qkv_proj",
    ),
    *("model.layers.0.mlp.experts", "experts", "o_proj", "head"),
    *(
        r".*\.mlp\..*",
        r"mlp\.",
        r"^model\.layers\.1\.",
        r".*layers\.1.*",
        r"o_proj$",
        r".*qkv_proj",
        r"[qk]_proj",
    ),
    *(r".*experts.*", r".*lm_head", r"["),
]
FIELDS: list[dict[str, Any]] = [
    {"bits": 16, "data_type": "float"},
    {"bits": 8},
    {"group_size": 32},
    {"bits": 2, "sym": False},
    {"bits": 4, "group_size": 128},
]
BLOCKS: list[Any] = [None, "model.layers", ["model.layers.1"], "model.layers.0,lm_head", "model.layers.1."]


def _config(chance: random.Random) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    extra = {chance.choice(KEYS): chance.choice(FIELDS) for _ in range(chance.randrange(5))}
    blocks = chance.choice(BLOCKS)
    return (
        config
        | ({"extra_config": extra} if extra else {})
        | ({"block_name_to_quantize": blocks} if blocks is not None else {})
    )


def test_every_module_of_random_configurations(tmp_path: Path) -> None:
    PEER.python()
    chance = random.Random(3)
    configs = [_config(chance) for _ in range(2000)]
    modules = fused_modules(Matrix(n, GPTQ, (64, 64), 4, 1, 0, (f"{n}.qweight",)) for n in NAMES)
    kinds = ["head" if m.head else "experts" if m.experts else "linear" for m in modules]
    out = tmp_path / "answers.json"
    named = [[m.name, kind] for m, kind in zip(modules, kinds, strict=True)]
    PEER.run(
        "vllm_schemes.py",
        {"configs": configs, "modules": named, "merged": MERGED, "out": str(out)},
        tmp_path,
    )
    read = AutoRoundReader(re.search, ends=True)
    for config, answers in zip(configs, json.loads(out.read_text()), strict=True):
        folder = Folder(Path("m"), {}, config, None, (), 0)
        for module, theirs in zip(modules, answers, strict=True):
            try:
                found = read(folder, module)
                ours = found and [found.bits, found.group_size, found.sym]
            except CannotReadError as error:
                ours = str(error)
            if isinstance(ours, str):
                assert isinstance(theirs, str), (config, module.name, ours, theirs)
            else:
                assert ours == theirs, (config, module.name, ours, theirs)
