"""Models that judge pictures by their captions: which package and which weights each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from auto_round.errors import ConfigError, Refusal, UnsupportedError


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric needs.

    Attributes:
        package: module that computes it.
        install: name of that package.
        weights: model on the hub.
        file: a file of it that tells whether it is in the cache.
    """

    package: str
    install: str
    weights: str
    file: str


METRICS: Mapping[str, Metric] = {
    "clip": Metric(
        "torchmetrics", "torchmetrics[multimodal]", "openai/clip-vit-large-patch14", "config.json"
    ),
    "clip-iqa": Metric(
        "torchmetrics", "torchmetrics[multimodal]", "openai/clip-vit-large-patch14", "config.json"
    ),
    "imagereward": Metric("ImageReward", "image-reward", "THUDM/ImageReward", "ImageReward.pt"),
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


def _missing(name: str) -> Refusal | None:
    from huggingface_hub import try_to_load_from_cache

    metric = METRICS[name]
    if importlib.util.find_spec(metric.package) is None:
        return Refusal(name, f"needs a package that is missing: pip install {metric.install}")
    if not isinstance(try_to_load_from_cache(metric.weights, metric.file), str):
        return Refusal(
            name, f"its weights are not on this machine: hf download {metric.weights}", "or leave it out"
        )
    return None
