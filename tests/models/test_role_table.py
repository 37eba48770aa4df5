"""Every matrix of a model has a row, once; an unknown family logs them and goes on."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter

import pytest

from auto_round.cli import main as cli
from auto_round.config import build_options
from auto_round.facts.layer import Role
from auto_round.facts.roles import render_roles
from auto_round.models import role_table
from auto_round.models.folder import FolderSource
from auto_round.models.tried_families import TRIED
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.testing.tiny_models import save_tiny_model
from sweep.configurations import FAMILIES as TEXT
from sweep.configurations import family_config
from sweep.multimodal import FAMILIES as PICTURED
from sweep.multimodal import model_config
from sweep.outcome import save_config


def config_of(name):
    return model_config(name) if name in PICTURED else family_config(name)


WANTED = {
    "llama": {
        ("text", "model.layers.{0-1}.self_attn.q_proj", (64, 64), 2),
        ("text", "model.layers.{0-1}.mlp.down_proj", (64, 96), 2),
        ("head", "lm_head", (128, 64), 1),
        ("embedding", "model.embed_tokens", (128, 64), 1),
    },
    "qwen2_moe": {
        ("expert", "model.layers.{0-1}.mlp.experts.{0-3}.gate_proj", (64, 64), 8),
        ("shared expert", "model.layers.{0-1}.mlp.shared_expert.down_proj", (64, 96), 2),
        ("router", "model.layers.{0-1}.mlp.gate", (4, 64), 2),
        ("router", "model.layers.{0-1}.mlp.shared_expert_gate", (1, 64), 2),
    },
    "gpt_oss": {("router", "model.layers.{0-1}.mlp.router", (4, 64), 2)},
    "mamba": {
        ("text", "backbone.layers.{0-1}.mixer.in_proj", (192, 64), 2),
        ("kept", "backbone.layers.{0-1}.mixer.conv1d", (96, 1, 4), 2),
    },
    "qwen2_5_vl": {
        ("text", "model.layers.{0-1}.mlp.down_proj", (64, 96), 2),
        ("tower", "visual.blocks.{0-1}.attn.qkv", (192, 64), 2),
        ("kept", "visual.merger.mlp.0", (256, 256), 1),
        ("kept", "visual.patch_embed.proj", (64, 3, 2, 14, 14), 1),
    },
}


@pytest.mark.parametrize("name", WANTED)
def test_each_matrix_has_one_role(tmp_path, name):
    with FolderSource.open(save_config(config_of(name), tmp_path / "model")) as source:
        rows, disk = source.roles, source.tensors
        assert {(r.role, r.names, r.shape, r.count) for r in rows} >= WANTED[name]
        wide = {tensor: spec.shape for tensor, spec in disk.items() if len(spec.shape) > 1}
        matrices = Counter(layer.tensor for layer in source.layers if layer.fused)
        assert sum(row.count for row in rows) == sum(matrices.get(tensor, 1) for tensor in wide)
        assert sum(row.weights for row in rows) == sum(map(math.prod, wide.values()))
        assert all(row.note for row in rows if row.role in {"kept", "tower", "head", "router"})
        assert len(render_roles(rows).splitlines()) == len(rows)


def test_each_role_has_its_place():
    assert {role_table._WORDS.get(role, role.value) for role in Role} <= set(role_table._ORDER)


def test_a_tied_head_is_told_beside_the_embedding(tmp_path):
    with FolderSource.open(save_tiny_model("qwen2", tmp_path / "model")) as source:
        found = {row.role: row.names for row in source.roles}
    assert found["head"] == "lm_head"
    assert found["embedding"] == "model.embed_tokens"


def test_what_was_tried_is_what_the_sweep_tries():
    assert {*TEXT, *(family.model_type for family in PICTURED.values())} == TRIED


@pytest.mark.parametrize("tried", [True, False])
def test_a_family_that_nobody_tried_logs_its_roles_and_goes_on(tmp_path, monkeypatch, caplog, tried):
    model = save_tiny_model("llama", tmp_path / "model")
    if not tried:
        monkeypatch.setattr("auto_round.models.assembled.TRIED", frozenset({"qwen3"}))
    caplog.set_level(logging.INFO, "auto_round")
    given = {"model": str(model), "output_dir": str(tmp_path / "out"), "iters": 0, "disable_opt_rtn": True}
    job = prepare(build_options(given))
    assert job.plan.quantized
    assert ("not among those that were tried" in caplog.text) is not tried
    assert (
        bool(re.search(r"^text +model\.layers\.\{0-1\}\.self_attn\.q_proj", caplog.text, re.M)) is not tried
    )


def test_inspect_prints_the_roles_of_a_plain_folder(tmp_path, capsys):
    model = save_config(model_config("mllama"), tmp_path / "model")
    assert cli.main(["inspect", str(model)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^tuning +block by block; only rows with images run blocks 1$", said, re.MULTILINE)
    assert re.search(r"^text +21 matrices", said, re.MULTILINE)
    assert re.search(
        r"^tower +vision_model\.transformer\.layers\.\{0-1\}\.mlp\.fc1 +96x64 +2  ", said, re.MULTILINE
    )
    assert cli.main(["inspect", "--json", str(model)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["blocks"] == "2 MllamaSelfAttentionDecoderLayer, 1 MllamaCrossAttentionDecoderLayer"
    assert {row["role"] for row in found["roles"]} == {"text", "tower", "head", "embedding", "kept"}


def test_inspect_says_why_blocks_cannot_be_tuned(tmp_path, capsys):
    model = save_config(family_config("dory"), tmp_path / "model")
    assert cli.main(["inspect", str(model)]) == 0
    assert "tuning     refused: its blocks run in the order [0, 1, 0, 1]" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert cli.main(["inspect", str(tmp_path / "empty")]) == 2
    assert "give the folder of a model" in capsys.readouterr().err
