"""A third model for accuracy figures: SmolLM2-135M cut to 8 of its 30 blocks, trained to predict alike.

It has 57 million weights, which no grid of codes has seen (SmolLM2's come from a file of 4 bits), and massive
activations of its own: the first token of a row is larger by a factor of thousands, as in large models.

    python benchmarks/pruned_model.py MODEL OUT TEXT.jsonl [TEXT.jsonl ...]

Blocks are left out one by one, always the one that costs the least divergence on 512 tokens. Then all weights
learn (AdamW, divergence from the whole model's predictions, rows of 256 tokens of the texts). The first rows
of each text are left out: calibration and measurements read those. The work goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCKS = 8
LENGTH = 256
ROWS = 4
"""Rows of a step."""
LEFT_OUT = 100
"""Texts at the beginning of each file that nothing is learned from."""
RATE, WARM_UP, LAST = 4e-4, 40, 0.1
"""AdamW's rate, steps over which it grows, and its share at the end."""
CHUNK = 256
"""Positions whose logits are held in float32 at a time."""
EVERY = 100
"""Steps between two states on disk."""


def rows_of(texts: Sequence[Path], tokenizer: Any) -> Tensor:
    """Rows of tokens `[n, LENGTH]`, in an order that is the same in every run."""
    found = [json.loads(line)["text"] for path in texts for line in path.read_text().splitlines()[LEFT_OUT:]]
    order = torch.Generator().manual_seed(1)
    ids: list[int] = []
    for i in torch.randperm(len(found), generator=order).tolist():
        ids += [*tokenizer(found[i], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=order)]


def divergence(teacher: nn.Module, student: nn.Module, ids: Tensor) -> Tensor:
    """Mean KL of the student's predictions from the teacher's, nats per token; differentiable."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits.flatten(0, 1)
        given = student(ids, use_cache=False).logits.flatten(0, 1)
    parts = [
        nn.functional.kl_div(
            b.float().log_softmax(-1), a.float().log_softmax(-1), log_target=True, reduction="sum"
        )
        for a, b in zip(wanted.split(CHUNK), given.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum() / len(wanted)


def leave_out(model: Any, blocks: Sequence[int]) -> None:
    """Keep only these blocks of a model."""
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in blocks)
    model.config.num_hidden_layers = len(blocks)
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in blocks]


def chosen_blocks(model: Any, ids: Tensor) -> Iterator[tuple[float, list[int]]]:
    """Divergence on some rows, and blocks that are left, one fewer each time."""
    every, kept = list(model.model.layers), list(range(len(model.model.layers)))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits.float().log_softmax(-1)

        def without(block: int) -> float:
            model.model.layers = nn.ModuleList(every[i] for i in kept if i != block)
            model.config.num_hidden_layers = len(kept) - 1
            given = model(ids, use_cache=False).logits.float().log_softmax(-1)
            return float((wanted.exp() * (wanted - given)).sum(-1).mean())

        while len(kept) > BLOCKS:
            cost, gone = min((without(block), block) for block in kept)
            kept.remove(gone)
            yield cost, list(kept)


def largest_tokens(model: Any, ids: Tensor) -> list[tuple[float, float]]:
    """Behind each block: mean square of the largest token and of the median one."""
    with torch.no_grad():
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    energies = [state.float().square().mean(-1).flatten() for state in states[1:]]
    return [(float(energy.max()), float(energy.median())) for energy in energies]


def main() -> None:
    """Make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("texts", type=Path, nargs="+", help='JSON lines with the field "text"')
    parser.add_argument("--steps", type=int, default=700)
    given = parser.parse_args()
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = rows_of(given.texts, tokenizer)
    held, rows = rows[:8], rows[8:]
    teacher = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval()
    state = given.out.parent / f"{given.out.name}.training.pt"
    if state.exists():
        kept, step, weights, moments = torch.load(state, weights_only=True).values()
    else:
        for cost, kept in chosen_blocks(
            AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).eval(), held[:2]
        ):
            print(f"{len(kept)} blocks, KL {cost:.3f}: {kept}", flush=True)
        step, weights, moments = 0, None, None
    student = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    leave_out(student, kept)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if weights is not None:
        student.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    began = time.process_time()
    while step < given.steps:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * (1 - (1 - LAST) * step / given.steps)
        at = step * ROWS % (len(rows) - ROWS)
        loss = divergence(teacher, student, rows[at : at + ROWS])
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % EVERY == 0 or step == given.steps:
            with torch.no_grad():
                found = float(divergence(teacher, student, held))
            print(
                f"step {step}: KL {found:.3f} on held-out rows, {time.process_time() - began:.0f} s",
                flush=True,
            )
            now = {"kept": kept, "step": step, "m": student.state_dict(), "o": optimizer.state_dict()}
            torch.save(now, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    student.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    state.unlink()
    for i, (largest, median) in enumerate(largest_tokens(student, held)):
        print(
            f"behind block {i}: mean squares of the largest token {largest:.3g}, of the median {median:.3g}"
        )


if __name__ == "__main__":
    main()
