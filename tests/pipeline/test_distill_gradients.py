"""The sweep has the gradients of plain autograd through the whole model, whichever units stay in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from auto_round.calibration.row import joined
from auto_round.config import build_options
from auto_round.numerics.scale import Knobs
from auto_round.numerics.token_weights import token_energy, token_weights
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.distilling.feed import trace_some, whole
from auto_round.pipeline.distilling.shelf import LEARNED, MOMENTS, Shelf, begin
from auto_round.pipeline.distilling.sweep import Boundaries, Sweep, squared_error
from auto_round.pipeline.distilling.units import Units
from auto_round.pipeline.running.input_ranges import InputRanges
from auto_round.pipeline.running.streams import Home
from auto_round.tuning.distill import FEATURES, DistillConfig
from auto_round.tuning.predictions import Ends
from auto_round.tuning.student import HIGH, LOW, NORM, OFFSET
from auto_round.tuning.weights import Weight
from pipeline.runs import SHORT, token_rows

BEFORE = 0.5
"""Squared error behind each block before the first step: any number serves."""
CPU = torch.device("cpu")


def job_of(folder, rows, **given):
    options = {
        **SHORT,
        "amp": False,
        "bits": 3,
        "distill_steps": 1,
        "distill_nsamples": 3,
        "nsamples": 2,
        **given,
    }
    return prepare(build_options({**options, "model": str(folder), "output_dir": "out"}), dataset=rows)


def begun(job, folder, members):
    """Offsets and knobs of chance for every weight."""
    generator = torch.Generator().manual_seed(5)
    for number, indices in enumerate(members):
        learned = {}
        for layer, fmt in job.quantized().values():
            if layer.block in indices:
                path = job.source.blocks[layer.block].module
                name = f"{indices.index(layer.block)}.{layer.parameter.removeprefix(path + '.')}"
                weight = job.source.read(layer)
                groups = fmt.stats(weight).lo.shape
                learned[OFFSET + name] = 0.3 * torch.rand(weight.shape, generator=generator) - 0.15
                for side in (LOW, HIGH):
                    learned[side + name] = 0.8 + 0.2 * torch.rand(groups, generator=generator)
        begin(folder, number, learned, {})


def expected(job, model, shelf, members, batch):
    """Gradients of all that is learned, by unit and name, and the divergence."""
    values, parameters = {}, {}
    for number, indices in enumerate(members):
        learned = shelf.load(number, LEARNED)
        for position, index in enumerate(indices):
            path = job.source.blocks[index].module
            for name, parameter in model.get_submodule(path).named_parameters():
                full, inside = f"{path}.{name}", f"{position}.{name}"
                if OFFSET + inside in learned:
                    keys = {k: f"{k}{inside}" for k in (OFFSET, LOW, HIGH)}
                    v, lo, hi = (learned[key].requires_grad_() for key in keys.values())
                    values |= {(number, key): t for key, t in zip(keys.values(), (v, lo, hi), strict=True)}
                    fmt = next(f for la, f in job.quantized().values() if la.parameter == full)
                    stats = fmt.stats(parameter)
                    weight = Weight(
                        fmt.bind(stats), parameter.detach(), stats, Knobs(lo, hi), v, torch.float32
                    )
                    parameters[full] = weight.fake(hold=True)
                elif parameter.dim() == 1:
                    value = parameter.detach().clone().requires_grad_()
                    values[number, NORM + inside] = parameters[full] = value
    outputs = {}
    for block in job.source.blocks:
        model.get_submodule(block.module).register_forward_hook(
            lambda module, args, out, key=block.index: outputs.update(
                {key: out[0] if isinstance(out, tuple) else out}
            )
        )
    inputs = {**joined(batch), "use_cache": False}
    with torch.no_grad():
        target = model(**inputs).logits.log_softmax(-1)
    originals = dict(outputs)
    logits = functional_call(model, parameters, (), inputs).logits.log_softmax(-1)
    kl = torch.nn.functional.kl_div(logits, target, log_target=True, reduction="none").sum(-1).mean()
    ends = [indices[-1] for indices in members]
    errors = []
    for end in ends:
        weights = token_weights(token_energy(originals[end]))
        squares = (outputs[end] - originals[end]).square().mean(-1)
        errors.append((squares * weights).mean())
        assert float(errors[-1].detach()) == pytest.approx(
            squared_error(outputs[end].detach(), originals[end], None), rel=1e-5
        )
    loss = kl + FEATURES * sum(errors) / len(ends) / BEFORE
    loss.backward()
    return {key: v.grad for key, v in values.items()}, float(kl.detach())


@pytest.mark.parametrize(
    ("family", "given"),
    [("llama", {}), ("qwen3", {"nblocks": 2, "sym": False}), ("qwen2_moe", {})],
    ids=["llama", "two blocks as one", "experts"],
)
@pytest.mark.parametrize(
    ("stay", "at_once"),
    [(0, 8), (1, 2), (None, 8)],
    ids=["none stays", "the last stays, two passes", "all stay"],
)
def test_gradients_are_those_of_the_whole_model(tiny, tmp_path, family, given, stay, at_once):
    folder = tiny(family, torch.float32, num_hidden_layers=3)
    rows = token_rows()
    job = job_of(folder, rows, **given)
    job = replace(job, tune=replace(job.tune, rows_at_once=at_once))
    size = given.get("nblocks", 1)
    blocks = [block.index for block in job.source.blocks]
    members = [blocks[i : i + size] for i in range(0, len(blocks), size)]
    begun(job, tmp_path, members)
    shelf = Shelf(tmp_path, len(members), in_memory=True)
    units = Units(job, members, shelf, InputRanges(), {})
    batch = whole(*trace_some(job, job.fresh[:3], tmp_path, None))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    wanted, kl = expected(job, model, shelf, members, job.fresh[:3])
    with job.source.stem(CPU, torch.float32) as stem:
        ends = Ends(stem.finish, stem.finish, 7)
        many = len(members) if stay is None else stay
        sweep = Sweep(units, ends, DistillConfig(steps=1), [BEFORE] * len(members), stay=many)
        room = Boundaries.like(batch, len(members), Home(CPU, files=False), tmp_path)
        with torch.no_grad():
            assert sweep.step(batch, room, 0) == pytest.approx(kl, rel=1e-4)
    compared = 0
    for (unit, name), gradient in wanted.items():
        moments = shelf.load(unit, MOMENTS)
        mean = moments.get(f"mean.{name}")
        if (total := moments.get(f"sum.{name}")) is not None:
            mean = total * 0.1
        if gradient is None:
            assert mean is None or not mean.any()
            continue
        largest = float(gradient.abs().max())
        assert torch.allclose(mean / 0.1, gradient, rtol=1e-3, atol=2e-4 * largest), (unit, name)
        compared += 1
    assert compared >= 4 * 3 * 3
