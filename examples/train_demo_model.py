"""Trains the demonstration model that ships in `examples/demo-model`: run it again to get the file again.

    python examples/train_demo_model.py examples/demo-model

A Qwen3-shaped model of 1.8M parameters (six blocks, every width a multiple of 128, tied head) learns the
`python-docs` text: the language reference and the standard library's docstrings of the CPython that runs this
script. One core needs about half an hour. The defaults below are those that made the shipped weights; another
version of Python has another text and so gives other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from auto_round.calibration.python_docs import PythonDocs

END_OF_TEXT = "<|endoftext|>"
PROMPTS = ("Raise ValueError if", "class collections.OrderedDict(dict)\n\n", 'The "for" statement')


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the text and the library versions."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 512
    blocks: int = 6
    heads: int = 2
    head_dim: int = 64
    seqlen: int = 512
    batch_size: int = 4
    steps: int = 2400
    warmup_steps: int = 100
    lr: float = 4e-3
    weight_decay: float = 0.4
    held_out_every: int = 20
    seed: int = 42


def split_documents(documents: Sequence[str], every: int) -> tuple[list[str], list[str]]:
    """Return (documents to train on, documents held out): every `every`-th one is held out."""
    filled = [text for text in documents if text]
    return [t for i, t in enumerate(filled) if i % every], filled[::every]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned from the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: transformers.PreTrainedTokenizerFast, documents: Sequence[str]) -> Tensor:
    """Return one int64 stream of all documents, each closed by the end-of-text token."""
    end = tokenizer.eos_token_id
    return torch.tensor([t for ids in tokenizer(list(documents))["input_ids"] for t in (*ids, end)])


def make_model(recipe: Recipe) -> nn.Module:
    """Return the untrained model, float32, initialised from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = transformers.Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.seqlen,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.Qwen3ForCausalLM(config)


def windows(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield batches `[batch_size, seqlen]` for ever; each epoch cuts at a new offset and shuffles anew."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.seqlen, (1,), generator=generator))
        rows = stream[offset:].split(recipe.seqlen)[:-1]
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            yield torch.stack([rows[i] for i in order[start : start + recipe.batch_size]])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of one step: linear warm-up, then a cosine down to nothing."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy of each next token, nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, stream: Tensor, recipe: Recipe) -> float:
    """Return exp(mean loss) over the stream cut in windows of seqlen."""
    rows = torch.stack(stream.split(recipe.seqlen)[:-1])
    losses = [loss_of(model, batch) * len(batch) for batch in rows.split(recipe.batch_size)]
    return float((torch.stack(losses).sum() / len(rows)).exp())


def make_optimizers(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the blocks' matrices and AdamW for embeddings and norms.

    After 250 steps the loss was 4.10 against 5.03 with AdamW alone, for a tenth more time a step.
    """
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    norms = [p for p in model.parameters() if p.dim() == 1]
    decayed, free = (
        {"params": embeddings, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    )
    return (
        torch.optim.Muon(
            matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([decayed, free], lr=recipe.lr, betas=(0.9, 0.95), fused=True),
    )


def train(model: nn.Module, stream: Tensor, held_out: Tensor, recipe: Recipe) -> None:
    """Train in place and print the losses."""
    optimizers = make_optimizers(model, recipe)
    began, recent = time.monotonic(), []
    batches = windows(stream, recipe)
    for step in range(recipe.steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, recipe)
        loss = loss_of(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            tail = (
                f"  held-out perplexity {perplexity(model, held_out, recipe):.2f}"
                if (step + 1) % 400 == 0
                else ""
            )
            seconds = time.monotonic() - began
            print(f"step {step + 1}  loss {sum(recent) / len(recent):.3f}  {seconds:.0f} s{tail}", flush=True)
            recent.clear()


def save(folder: Path, model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Write the folder that `from_pretrained` reads, weights in bfloat16."""
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, max_new_tokens=64
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def write_readme(folder: Path, facts: dict[str, object], lines: Sequence[str]) -> None:
    """Write the page that says what the folder holds and how it came about."""
    samples = "\n\n".join(f"```text\n{line.rstrip()}\n```" for line in lines)
    (folder / "README.md").write_text(
        f"""---
license: apache-2.0
language: en
library_name: transformers
---

# A really trained, really small language model

{facts["parameters"]:,} parameters in the Qwen3 architecture, trained by `examples/train_demo_model.py` on the
documentation inside CPython {facts["python"]}: the language reference that `help()` shows and the docstrings
of the standard library ({facts["tokens"]:,} tokens of its own byte-level BPE; documents with
{facts["held_out_tokens"]:,} tokens were held out). It writes text that looks like Python's documentation and
knows nothing. It is here so that quantization can be tried, and its loss measured, without a download.

| | perplexity |
|---|---|
| held-out documents | {facts["perplexity"]} |
| documents trained on | {facts["train_perplexity"]} |

Windows of {facts["seqlen"]} tokens, bfloat16 weights.

## What it writes

Greedy, repetition penalty 1.2:

{samples}

## How it was made

    python examples/train_demo_model.py examples/demo-model

PyTorch {facts["torch"]}, one CPU core, these settings:

```json
{json.dumps(facts["recipe"], indent=1)}
```

## Licence

The weights are under the licence of this project. The text that they were trained on is the Python
documentation, copyright Python Software Foundation, under the PSF License Version 2.
""",
        encoding="utf-8",
    )


@torch.no_grad()
def sample(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt and its greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=64, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(made[0]))


def main() -> None:
    """Train, save, and print and write down what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    folder, recipe = arguments.pop("folder"), Recipe(**arguments)

    documents, kept_back = split_documents(PythonDocs()[:], recipe.held_out_every)
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    stream, held_out = encode(tokenizer, documents), encode(tokenizer, kept_back)
    model = make_model(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(documents)} documents, {len(stream)} tokens; {len(held_out)} held out; {parameters} parameters"
    )

    train(model, stream, held_out, recipe)
    save(folder, model, tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)  # measured as anyone will load it
    facts = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "seqlen": recipe.seqlen,
        "tokens": len(stream),
        "held_out_tokens": len(held_out),
        "perplexity": round(perplexity(model, held_out, recipe), 2),
        "train_perplexity": round(perplexity(model, stream[: len(held_out)], recipe), 2),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    print(json.dumps(facts, indent=1))
    lines = [sample(model, tokenizer, prompt) for prompt in PROMPTS]
    print("\n---\n".join(lines))
    write_readme(folder, facts, lines)


if __name__ == "__main__":
    main()
