"""`AutoRoundDiffusion`: the class that pipelines of diffusers had of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auto_round.autoround.api import AutoRound
from auto_round.errors import ConfigError


class AutoRoundDiffusion(AutoRound):
    """`AutoRound` for pipelines of diffusers alone, with their options first, as earlier versions had it.

    `AutoRound` knows pipelines too.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator_seed: int | None = None,
        *positional: Any,
        **named: Any,
    ) -> None:
        """Take the arguments of `AutoRound`.

        Args:
            model: folder or hub name of a pipeline, or a pipeline in memory (left as it is).
            tokenizer: not used: a pipeline has its own.
            guidance_scale: how closely pictures follow captions; the pipeline's own when not given.
            num_inference_steps: denoising steps for a picture; the pipeline's own when not given.
            generator_seed: seed of the noise; that of the run when not given.
            positional: further arguments in the order of `AutoRound`.
            named: arguments of `AutoRound` by name.

        Raises:
            ConfigError: it is no pipeline.
        """
        given = {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "generator_seed": generator_seed,
        }
        named |= {name: value for name, value in given.items() if value is not None}
        super().__init__(model, tokenizer, *positional, **named)
        local = self._model is not None or Path(self.options.model.model).expanduser().is_dir()
        if local and not self._is_pipeline:
            raise ConfigError(f"{self.options.model.model} is no pipeline of diffusers: use AutoRound for it")
