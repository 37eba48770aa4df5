"""Models that judge pictures: refused where they are not there, computed by their formulas where they are."""

from __future__ import annotations

import sys
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


STAND_IN = """
calls = []

class Model:
    def score(self, prompt, image):
        calls.append((prompt, image.size, image.mode))
        return float(len(prompt))

def load(name="ImageReward-v1.0", device="cuda", download_root=None, med_config=None):
    calls.append((name, device, med_config))
    return Model()
"""


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """A package that is called as image-reward 1.5 is, and files where those of its model lie."""
    (tmp_path / "ImageReward.py").write_text(STAND_IN)
    for name in ("ImageReward.pt", "med_config.json", "vocab.txt"):
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ImageReward", raising=False)
    here = {"weights": str(tmp_path), "reads": (str(tmp_path), ("vocab.txt",))}
    one = replace(metrics.METRICS["imagereward"], **here)
    monkeypatch.setattr(metrics, "METRICS", {"imagereward": one})
    yield tmp_path
    sys.modules.pop("ImageReward", None)


def test_image_reward_is_given_captions_pictures_and_files(reward):
    metrics.refuse_metrics(["imagereward"], drawn=True)
    captions = ["a red cat", "a dog"]
    assert metrics.judged(["imagereward"], captions, torch.rand(2, 8, 12, 3)) == {"imagereward": 7.0}
    import ImageReward

    files = [str(reward / name) for name in ("ImageReward.pt", "med_config.json")]
    assert ImageReward.calls == [
        (files[0], "cpu", files[1]),  # so that nothing is fetched
        *((caption, (12, 8), "RGB") for caption in captions),
    ]


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json", "vocab.txt"])
def test_each_file_of_image_reward_is_needed(reward, name):
    (reward / name).unlink()
    with pytest.raises(UnsupportedError, match=f"hf download {reward}"):
        metrics.refuse_metrics(["imagereward"], drawn=True)


def test_a_package_that_does_not_import_is_refused(reward):
    (reward / "ImageReward.py").write_text("from transformers.modeling_utils import no_longer_there\n")
    with pytest.raises(UnsupportedError, match="does not work with what is installed"):
        metrics.refuse_metrics(["imagereward"], drawn=True)
