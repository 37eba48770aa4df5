"""Drawing: the arguments of a pipeline's call, settled before anything is loaded, and the call itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.config import Options
from auto_round.errors import AutoRoundError, ConfigError, is_out_of_memory, nearest
from auto_round.models.pipeline_folder import DENOISERS, PipelineFolder

STEPS = "num_inference_steps"
_OWN = frozenset(
    {"self", "prompt", "generator", "output_type", "return_dict", "latents", STEPS, "guidance_scale"}
)
"""Arguments that are not given as `pipeline_args`."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a pipeline is called.

    Attributes:
        arguments: beside captions, noise and kind of output.
        steps: denoising steps of a picture.
        seed: of the noise; picture `i` begins with the noise of `seed + i`, however many are drawn at once.
        at_once: captions drawn at once.
    """

    arguments: Mapping[str, Any]
    steps: int
    seed: int
    at_once: int

    def on(self, pipeline: Any) -> Drawing:
        """The same with a pipeline in memory."""
        return Drawing(pipeline, self)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A pipeline in memory and how it is called."""

    pipeline: Any
    call: Call

    @property
    def at_once(self) -> int:
        """Captions drawn at once."""
        return self.call.at_once

    @property
    def steps(self) -> int:
        """Denoising steps of a picture."""
        return self.call.steps

    @property
    def denoisers(self) -> tuple[nn.Module, ...]:
        """Components that are called at every step."""
        parts = (getattr(self.pipeline, name, None) for name in DENOISERS)
        return tuple(part for part in parts if isinstance(part, nn.Module))

    def latents(self, captions: Sequence[str], first: int) -> Any:
        """What the denoising ends with for some captions, the first of which has number `first`."""
        return self._run(captions, first, "latent")

    def pictures(self, captions: Sequence[str], first: int) -> Any:
        """The pictures for some captions, `[captions, height, width, 3]`, numbers from 0 to 1."""
        return self._run(captions, first, "np")

    def _run(self, captions: Sequence[str], first: int, kind: str) -> Any:
        noise = [torch.Generator().manual_seed(self.call.seed + first + i) for i in range(len(captions))]
        with torch.no_grad(), _asked_of(self.pipeline):
            output = self.pipeline(
                prompt=list(captions),
                generator=noise,
                output_type=kind,
                return_dict=False,
                **self.call.arguments,
            )
        return output[0]


@contextmanager
def _asked_of(pipeline: Any) -> Iterator[None]:
    """Say whose error it is where a pipeline cannot do what it is asked for.

    Raises:
        ConfigError: with the pipeline's own words.
    """
    try:
        yield
    except AutoRoundError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"{type(pipeline).__name__} does not draw captions as asked ({type(error).__name__}: "
            f"{str(error).strip()[:300]}): see pipeline_args, and that it needs nothing but captions"
        ) from error


def settle_call(options: Options, folder: PipelineFolder) -> Call:
    """The arguments that the user's options mean, for a pipeline.

    Raises:
        ConfigError: the pipeline takes no captions, or no such argument.
    """
    wanted, known = options.diffusion, folder.call_parameters
    if "prompt" not in known:
        raise ConfigError(f"{folder.class_name} draws no captions, so it cannot be calibrated with any")
    given = dict(wanted.pipeline_args or {})
    for name in given:
        if name in _OWN or name not in known:
            others = [other for other in known if other not in _OWN]
            why = (
                "has an option of its own or is not yours to give" if name in _OWN else nearest(name, others)
            )
            raise ConfigError(f'pipeline_args: {folder.class_name} takes no "{name}" here: {why}')
    if wanted.guidance_scale is not None:
        if "guidance_scale" not in known:
            raise ConfigError(f"{folder.class_name} takes no guidance_scale: leave it out")
        given["guidance_scale"] = wanted.guidance_scale
    steps = wanted.num_inference_steps or _default_steps(known)
    if STEPS in known:
        given[STEPS] = steps
    seed = options.calibration.seed if wanted.generator_seed is None else wanted.generator_seed
    return Call(given, steps, seed, options.tune.batch_size)


def _default_steps(known: Mapping[str, inspect.Parameter]) -> int:
    default = known[STEPS].default if STEPS in known else 1
    return default if isinstance(default, int) else 1


def as_tensor(latents: Any) -> Tensor:
    """Latents as one float32 tensor on the host, `[pictures, ...]`."""
    if isinstance(latents, Tensor):
        return latents.detach().cpu().float()
    return torch.stack([torch.as_tensor(part, device="cpu").detach().float() for part in latents])
