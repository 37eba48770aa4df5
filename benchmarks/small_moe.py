"""Train a small mixture of experts on any text, in minutes on a CPU: random experts say little of rounding.

    python benchmarks/small_moe.py OUT TEXT [TEXT ...] --minutes 8

Writes a folder that Transformers loads: a Qwen3-MoE of about 11 million parameters, four blocks of eight
experts of which each token passes two, and a tokenizer of byte pairs learned from the same text. Texts are
plain files, or JSON lines with a field `text`; the last twentieth of each is left out of training and
measures the result. Prints one JSON line: tokens seen, seconds, and nats per token on that part.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH, ROWS = 128, 8
"""Tokens of a row, and rows of a step."""
HELD_OUT = 20
"""One part in so many is left out."""
LARGEST_LR, WARM_UP = 3e-3, 20


def texts_of(path: Path) -> list[str]:
    """Documents of a file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [content]
    return [json.loads(line)["text"] for line in content.splitlines() if line.strip()]


def make_tokenizer(texts: list[str], size: int) -> Any:
    """Byte pairs learned from some texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def make_model(vocabulary: int, width: int, experts: int) -> Any:
    """A mixture of experts with fresh weights, in float32."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=3 * width // 2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def train(model: Any, tokens: Tensor, seconds: float, seed: int) -> int:
    """Train on random rows for so long; returns the tokens seen. The step size follows the clock."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LARGEST_LR, betas=(0.9, 0.95), weight_decay=0.1)
    begin, step, last = time.monotonic(), 0, 0.0
    while (passed := time.monotonic() - begin) < seconds:
        share = min(1.0, passed / seconds)
        factor = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = LARGEST_LR * factor
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator).tolist()
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if passed - last > 30:
            last = passed
            print(f"{passed:.0f} s, step {step}, loss {float(loss):.3f}", flush=True)
    return step * ROWS * LENGTH


def measure(model: Any, tokens: Tensor, rows: int = 40) -> float:
    """Nats per token on the first rows of some tokens."""
    count = min(rows, len(tokens) // LENGTH)
    batches = tokens[: count * LENGTH].reshape(count, LENGTH).split(ROWS)
    model.config.output_router_logits = False
    with torch.no_grad():
        losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
    return sum(losses) / count


def main() -> None:
    """Read, learn, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    parts: list[str] = []
    held: list[str] = []
    for path in given.texts:
        together = "\n\n".join(texts_of(path))
        cut = len(together) - len(together) // HELD_OUT
        parts.append(together[:cut])
        held.append(together[cut:])
    tokenizer = make_tokenizer(parts, given.vocabulary)
    inside, outside = (
        torch.tensor([i for text in texts for i in [0, *tokenizer.encode(text)]]) for texts in (parts, held)
    )
    torch.manual_seed(given.seed)
    model = make_model(len(tokenizer), given.width, given.experts)
    begin = time.monotonic()
    seen = train(model, inside, 60 * given.minutes, given.seed)
    seconds = time.monotonic() - begin
    model.eval()
    loss = measure(model, outside)
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    size = sum(p.numel() for p in model.parameters())
    print(
        json.dumps({"parameters": size, "tokens": seen, "seconds": round(seconds, 1), "held_out_nats": loss})
    )


if __name__ == "__main__":
    main()
