"""Models that judge pictures: refused where they are not there, computed by their formulas where they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round.diffusion import metrics
from auto_round.errors import ConfigError, UnsupportedError
from diffusion.tiny import tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**part, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = CLIPConfig(
        text_config=text, vision_config={**part, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
    where = tmp_path_factory.mktemp("clip")
    model.save_pretrained(where)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer(77)).save_pretrained(where)
    return where


def test_scores(folder, monkeypatch):
    here = {name: replace(metrics.METRICS[name], weights=str(folder)) for name in ("clip", "clip-iqa")}
    monkeypatch.setattr(metrics, "METRICS", here)
    metrics.refuse_metrics(["clip", "clip-iqa"], drawn=True)
    pictures = torch.rand(3, 20, 20, 3, generator=torch.Generator().manual_seed(0))
    captions = ["a red cat", "a dog", "the blue square on the circle"]
    found = metrics.judged(["clip", "clip-iqa"], captions, pictures)
    each = [metrics.judged(["clip"], [c], p[None])["clip"] for c, p in zip(captions, pictures, strict=True)]
    assert found["clip"] == pytest.approx(sum(each) / 3, abs=1e-3)
    assert all(0 <= score <= 100 for score in each)
    assert 0 < found["clip-iqa"] < 1
    assert found == metrics.judged(["clip", "clip-iqa"], captions, pictures)


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--prompt"):
        metrics.refuse_metrics(["clip"], drawn=False)
    with pytest.raises(UnsupportedError, match="hf download openai/clip") as caught:
        metrics.refuse_metrics(["clip", "imagereward"], drawn=True)
    assert "image-reward" in str(caught.value)
    metrics.refuse_metrics([], drawn=False)
