"""Tunes all blocks of a small model together and prints the process's peak memory in bytes."""

from __future__ import annotations

import sys

import torch

from auto_round.config import build_options
from auto_round.pipeline.fitting import states
from auto_round.pipeline.machine.memory import peak_bytes
from auto_round.pipeline.quantize import run


def main() -> None:
    """Arguments: model folder, output folder, rows."""
    model, out, count = sys.argv[1:]
    # As for a model whose states do not fit.
    states.SPILL_BYTES = states.STAY_BYTES = states.SOME_STAY_BYTES = 0
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 128, (6 + int(count), 32), generator=generator).tolist()
    options = build_options(
        {
            **{
                "model": model,
                "output_dir": out,
                "device_map": "cpu",
                "group_size": 32,
                "bits": 2,
                "iters": 1,
            },
            **{"nsamples": 4, "seqlen": 32, "batch_size": 2, "verify": False, "format": "fake"},
            **{"distill_steps": 2, "distill_nsamples": int(count)},
        }
    )
    run(options, dataset=rows)
    sys.stdout.write(f"{peak_bytes()}\n")


if __name__ == "__main__":
    main()
