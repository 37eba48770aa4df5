"""Encoders: their blocks are tuned with images, one by one; what cannot be tuned is rounded, and said."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

from auto_round.config import build_options
from auto_round.facts.flow import BlockCall, Flow
from auto_round.models.auto_classes import load_model
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.pipeline.running.towers import quantize_towers
from pipeline.runs import SHORT, token_rows
from sweep.multimodal import image_rows, model_config
from sweep.outcome import save_config

TEXT = [row for row in token_rows(24, 40) if 100 not in row][:6]


def towers_of(model, rows, **given):
    """Rounded weights of a model's encoders, by parameter."""
    options = {**SHORT, "seqlen": 40, "nsamples": 12, "quant_nontext_module": True, "model": str(model)}
    options |= {"output_dir": f"{model}-out", "not_use_best_mse": False, **given}
    written = []
    job = prepare(build_options(options), dataset=rows)
    found = quantize_towers(job, lambda layer, q: written.append((layer.name, q)))
    assert len(written) == len(found)
    return found


def error(model, rows, weights):
    """Mean square difference of what the language model is given for the images of some rows."""
    whole = load_model(model, trust_remote_code=False, dtype=torch.float32).eval()
    tower = whole.get_encoder(modality="image")
    prefix = next(path for path, module in whole.named_modules() if module is tower) + "."
    inside = {name.removeprefix(prefix): w.float() for name, w in weights.items()}
    total = 0.0
    with torch.no_grad():
        for row in rows:
            given = {n: row[n] for n in ("image_grid_thw",) if n in row}
            args = (row["pixel_values"], *given.values())
            before = tower(*args).last_hidden_state
            after = torch.func.functional_call(tower, inside, args).last_hidden_state
            total += float((before - after).square().mean())
    return total


@pytest.mark.parametrize("name", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "llava"])
def test_tuned_encoders_are_nearer_than_rounded_ones(tmp_path, caplog, name):
    """On images that were not tuned on; so few random patches do not let tuning beat a search by much."""
    caplog.set_level(logging.INFO, "auto_round")
    model = save_config(model_config(name), tmp_path / "model")
    pictures = image_rows(name, 18)
    rows, unseen = [*pictures[:14], *TEXT[:2]], pictures[14:]
    rounded = towers_of(model, rows, iters=0, bits=2, disable_opt_rtn=True)
    tuned = towers_of(model, rows, iters=40, bits=2)
    assert tuned.keys() == rounded.keys()
    assert error(model, unseen, tuned) < 0.9 * error(model, unseen, rounded)
    losses = re.findall(r"\.\d: loss ([\d.e-]+), then ([\d.e-]+)", caplog.text)
    assert len(losses) == 2
    assert all(float(after) <= float(before) for before, after in losses)
    assert "not tuned" not in caplog.text


class Tile(nn.Module):
    """Adds a number of its own to each tile."""

    def forward(self, hidden, tiles):
        assert hidden.shape == (2, 3, 4)
        return (hidden + tiles[:, None, None],)


def test_the_patches_of_a_row_go_through_a_block_as_the_model_sends_them():
    call = BlockCall((None, torch.tensor([1.0, 2.0])), {}, (0,), lengths=(6,), shape=(2, 3, 4))
    kept = torch.arange(8 * 4).reshape(1, 8, 4).float()
    group = BlockGroup([Tile()], [Flow(("hidden",), ("hidden",))])
    (out,) = group(kept, [(call, (None,))])
    assert out.shape == kept.shape
    assert (out - kept)[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2, -24, -28]


def test_an_encoder_that_no_row_reaches_is_rounded_and_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "auto_round")
    model = save_config(model_config("qwen2_5_omni_thinker"), tmp_path / "model")
    rows = [*image_rows("qwen2_5_omni_thinker", 14), *TEXT[:2]]
    found = towers_of(model, rows, iters=1)
    assert len(found) == 26
    assert "model.audio_tower.layers is rounded in searched ranges, not tuned: no row reaches" in caplog.text
    assert "model.visual.blocks is rounded" not in caplog.text


def test_rows_that_no_group_divides_are_kept_or_get_smaller_groups(tmp_path, caplog):
    """Encoders have widths such as 4304 and 3420: 84 is to groups of 32 what they are to 128."""
    vision = {**model_config("qwen2_5_vl").vision_config.to_dict(), "intermediate_size": 84}
    config = model_config("qwen2_5_vl")
    config.vision_config = type(config.vision_config)(**vision)
    model = save_config(config, tmp_path / "model")
    rows = [*image_rows("qwen2_5_vl", 14), *TEXT[:2]]
    found = towers_of(model, rows, iters=1)
    assert "visual.blocks.{0-1}.mlp" in caplog.text
    assert {name.rpartition("blocks.")[2] for name in found} >= {"0.attn.qkv.weight", "1.attn.proj.weight"}
