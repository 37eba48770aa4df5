"""Models that judge pictures by their captions; each needs weights that are on this machine already."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.errors import ConfigError, Refusal, UnsupportedError

Judge = Callable[[str, Sequence[str], Sequence[Any]], float]
"""From weights, captions and pictures (uint8 `[height, width, 3]`) to a mean score."""

GOOD, BAD = "Good photo.", "Bad photo."
"""The pair of CLIP-IQA (Wang, Chan and Loy, "Exploring CLIP for assessing the look and feel of images")."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric needs, and how it is computed.

    Attributes:
        package: module that computes it.
        install: name of that package.
        weights: model on the hub, or a folder.
        files: what has to be there of it.
        judge: computes it.
        reads: another model, of which files have to be there too, and their names.
    """

    package: str
    install: str
    weights: str
    files: tuple[str, ...]
    judge: Judge
    reads: tuple[str, tuple[str, ...]] = ("", ())


def _clip_score(weights: str, captions: Sequence[str], pictures: Sequence[Any]) -> float:
    """Mean of 100 times the cosine of picture and caption, at least 0 (Hessel et al., "CLIPScore", 2021)."""
    model, processor = _clip(weights)
    seen, said = _embedded(model, processor, pictures, captions)
    return float((100 * (seen * said).sum(-1)).clamp_min(0).mean())


def _clip_iqa(weights: str, captions: Sequence[str], pictures: Sequence[Any]) -> float:
    """Mean probability of the better of two descriptions."""
    del captions
    model, processor = _clip(weights)
    seen, said = _embedded(model, processor, pictures, [GOOD, BAD])
    return float((100 * seen @ said.T).softmax(-1)[:, 0].mean())


def _image_reward(weights: str, captions: Sequence[str], pictures: Sequence[Any]) -> float:
    """Mean reward (Xu et al., "ImageReward", 2023). Files are named: else it would fetch them anew."""
    from PIL import Image

    model_file, layout = (str(_found(weights, name)) for name in METRICS["imagereward"].files)
    package = importlib.import_module("ImageReward")
    model = package.load(model_file, device="cpu", med_config=layout)
    scores = [
        float(model.score(caption, Image.fromarray(picture)))
        for caption, picture in zip(captions, pictures, strict=True)
    ]
    return sum(scores) / len(scores)


def _clip(weights: str) -> tuple[Any, Any]:
    from transformers import AutoProcessor, CLIPModel

    processor = AutoProcessor.from_pretrained(weights, local_files_only=True)
    return CLIPModel.from_pretrained(weights, local_files_only=True).eval(), processor


def _embedded(
    model: Any, processor: Any, pictures: Sequence[Any], texts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures and texts, `[n, width]` float32."""
    given = processor(
        text=list(texts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**given)
    seen, said = output.image_embeds.float(), output.text_embeds.float()
    return seen / seen.norm(dim=-1, keepdim=True), said / said.norm(dim=-1, keepdim=True)


_CLIP = "openai/clip-vit-large-patch14"

METRICS: Mapping[str, Metric] = {
    "clip": Metric("transformers", "transformers", _CLIP, ("model.safetensors",), _clip_score),
    "clip-iqa": Metric("transformers", "transformers", _CLIP, ("model.safetensors",), _clip_iqa),
    "imagereward": Metric(
        "ImageReward",
        "image-reward",
        "THUDM/ImageReward",
        ("ImageReward.pt", "med_config.json"),
        _image_reward,
        ("bert-base-uncased", ("vocab.txt",)),
    ),
}


def refuse_metrics(names: Sequence[str], *, drawn: bool) -> None:
    """Refuse metrics that cannot be computed here.

    Args:
        names: what is asked for.
        drawn: pictures are drawn.

    Raises:
        ConfigError: there are no pictures to judge.
        UnsupportedError: a package or weights are missing; names each.
    """
    if names and not drawn:
        raise ConfigError("metrics judge pictures: say what to draw with --prompt or --prompt_file")
    refusals = [refusal for name in names if (refusal := _missing(name)) is not None]
    if refusals:
        raise UnsupportedError("pictures cannot be judged as asked", refusals)


def judged(names: Sequence[str], captions: Sequence[str], pictures: Tensor) -> dict[str, float]:
    """Mean score of each metric.

    Args:
        names: the metrics.
        captions: of the pictures.
        pictures: `[n, height, width, 3]` with numbers from 0 to 1.
    """
    each = list((pictures.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    return {name: METRICS[name].judge(METRICS[name].weights, captions, each) for name in names}


def _missing(name: str) -> Refusal | None:
    metric = METRICS[name]
    if importlib.util.find_spec(metric.package) is None:
        return Refusal(name, f"needs a package that is missing: pip install {metric.install}")
    for weights, files in ((metric.weights, metric.files), metric.reads):
        if any(_found(weights, file) is None for file in files):
            reason = f"its weights are not on this machine: hf download {weights}"
            return Refusal(name, reason, "or leave it out")
    try:
        importlib.import_module(metric.package)
    except Exception as error:  # noqa: BLE001  image-reward 1.5 asks Transformers for what it no longer has
        why = str(error).strip().split("\n", 1)[0]
        reason = f"the package {metric.install} does not work with what is installed: {why}"
        return Refusal(name, reason, "leave it out")
    return None


def _found(weights: str, file: str) -> Path | None:
    """A file of a model in a folder, or on the hub where it is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    own = Path(weights) / file
    if own.is_file() or Path(weights).is_dir():
        return own if own.is_file() else None
    cached = try_to_load_from_cache(weights, file)
    return Path(cached) if isinstance(cached, str) else None
