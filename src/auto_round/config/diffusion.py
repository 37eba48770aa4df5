"""Options of pipelines of diffusers: how pictures are drawn, for calibration and to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.config import values
from auto_round.config.option import Spec, option, settle
from auto_round.errors import nearest

METRICS = ("clip", "clip-iqa", "imagereward")
"""Models that judge pictures, by the names of other versions."""


def _call_arguments(value: Any) -> Mapping[str, Any]:
    """Turn JSON, relaxed text such as `{height:512}`, a `.json` path or a mapping into a mapping."""
    try:
        given = values.layer_rules(value)
    except TypeError as error:
        raise TypeError("expected arguments as in {height:512,width:512}") from error
    return {name: _number(part) for name, part in given.items()}


def _number(value: Any) -> Any:
    """A number that relaxed text left as a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _metrics(value: Any) -> tuple[str, ...]:
    """Turn a comma list into names of metrics."""
    found = tuple(name.casefold().replace("_", "-") for name in values.names(value))
    for name in found:
        if name not in METRICS:
            raise ValueError(f'unknown metric "{name}": {nearest(name, METRICS)}')
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionOptions:
    """How pipelines of diffusers draw, for calibration and to compare pictures."""

    components: tuple[str, ...] = option(
        (),
        Spec(
            "parts of the pipeline to make small, comma list; its transformers or its U-Net when not given",
            convert=values.names,
        ),
    )
    num_inference_steps: int | None = option(
        None, Spec("denoising steps for a picture; the pipeline's own number when not given", low=1)
    )
    steps_per_caption: int = option(
        4,
        Spec(
            "denoising steps of each caption that are tuned on, spread over all steps from caption to "
            "caption; 0 for every step",
            low=0,
        ),
    )
    guidance_scale: float | None = option(
        None, Spec("how closely pictures follow captions; the pipeline's own when not given", low=0)
    )
    generator_seed: int | None = option(
        None, Spec("seed of the noise that pictures begin with; --seed when not given", low=0, high=2**63 - 1)
    )
    pipeline_args: Mapping[str, Any] | None = option(
        None,
        Spec(
            "further arguments of the pipeline's call: {height:512,width:512}, JSON or a .json file",
            convert=_call_arguments,
        ),
    )
    prompt: str | None = option(
        None, Spec("draw this with the original and with the result, and compare the pictures")
    )
    prompt_file: str | None = option(
        None, Spec("the same for captions of a .tsv, .jsonl, .json or .txt file", paths="read")
    )
    metrics: tuple[str, ...] = option(
        (),
        Spec(
            "comma list of clip, clip-iqa, imagereward: judge the pictures by these models too, which have "
            "to be on this machine",
            flags=("metrics", "metric"),
            aliases=("metric",),
            convert=_metrics,
        ),
    )
    image_save_dir: str | None = option(
        None, Spec("folder for the pictures; <output>/pictures when not given", paths="written")
    )

    def __post_init__(self) -> None:
        settle(self)
