"""Short runs over tiny pipelines, and what is looked at behind them."""

from __future__ import annotations

from auto_round.config import build_options
from auto_round.diffusion.prepare import prepare_pipeline
from diffusion.tiny import CAPTIONS, FAMILIES

SHORT = {
    "iters": 15,
    "nsamples": 5,
    "batch_size": 2,
    "bits": 2,
    "num_inference_steps": 3,
    "device_map": "cpu",
    "amp": False,
}
WHOLE = {"format": "auto_round,fake", "prompt": "a red cat", "report": True}


class Killed(BaseException):
    """What ends a run at once, as a signal does."""


def killed_after(blocks):
    """A sink of events that ends a run once so many blocks are tuned."""

    def kill(event):
        if event.stage == "tune" and event.done == blocks:
            raise Killed

    return kill


def job(folder, name, out, **given):
    """A prepared run over the pipeline of a family."""
    arguments = {"steps_per_caption": 2, "pipeline_args": FAMILIES[name][1], **SHORT}
    options = build_options({"model": str(folder), "output_dir": str(out), **arguments, **given})
    return prepare_pipeline(options, dataset=CAPTIONS)


def part(result, name="transformer"):
    """What a report says of a component."""
    return result.report["components"][name]


def tree(folder):
    """Every file but those that say when and how long."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
