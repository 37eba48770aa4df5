"""What this package writes for the peers to read, and what they have to find in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round.testing.tiny_models import save_tiny_model
from peer.peers import Answer, Question
from pipeline.runs import quantize

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
IDS = list(range(3, 51))
NEW_TOKENS = 8

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}

ROUNDINGS = 2.0
"""Most roundings between a stored code and the weight that a plain kernel multiplies with: scale, product."""

LOGITS_ROUNDOFFS = 32.0
"""Largest difference of logits, in unit roundoffs of the largest one.

A logit is the end of a chain of 6 blocks of some ten rounded steps each; seen are 3 to 6 roundoffs.
"""


@dataclass(frozen=True)
class Made:
    """One plan in several formats.

    Attributes:
        folders: format -> folder.
        fake: folder of the dequantized model, which any Transformers reads.
        weights: quantized layer -> its weight, float32, exact.
    """

    folders: Mapping[str, Path]
    fake: Path
    weights: Mapping[str, Tensor]

    def question(self, fmt: str, *, dtype: str = "float16", backend: str | None = None) -> Question:
        """Ask a peer for everything about one of the formats."""
        layers = {name: list(w.shape) for name, w in self.weights.items()}
        return Question(self.folders[fmt], layers, dtype, backend)


def float32_demo(folder: Path) -> Path:
    """The demo model in float32: its `fake` folder then holds the dequantized weights unrounded."""
    AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def model_with_biases(folder: Path) -> Path:
    """A random model whose attention has biases, in shapes that every peer takes."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    return save_tiny_model("qwen2", folder, **sizes)


def make(model: Path, out: Path, formats: Sequence[str], **given: Any) -> Made:
    """Round a model plainly and write it in these formats and as `fake`."""
    plain = {"iters": 0, "disable_opt_rtn": True, "group_size": 128, "dataset": None}
    result = quantize(model, out, **{**plain, **given, "format": ",".join(("fake", *formats))})
    fake, *others = result.folders
    stored = load_file(fake / "model.safetensors")
    names = [name for name, entry in result.plan.entries.items() if entry.scheme is not None]
    return Made(dict(zip(formats, others, strict=True)), fake, {n: stored[f"{n}.weight"] for n in names})


@torch.inference_mode()
def logits_of(folder: Path, ids: Sequence[int] = IDS, **options: Any) -> Tensor:
    """Logits `[1, tokens, vocabulary]` of a folder in this process, float32 unless `dtype` says otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits.float()


def check_weights(answer: Answer, weights: Mapping[str, Tensor], *, of_row: float = 0.0) -> None:
    """Every weight that the peer multiplies with is ours, rounded.

    Args:
        answer: of the peer.
        weights: ours, exact.
        of_row: error allowed besides, in unit roundoffs of the row's largest weight, for kernels that round
            zero points or activations apart from weights.
    """
    assert set(answer.weights) == set(weights)
    u, least = UNIT_ROUNDOFF[answer.dtype], SMALLEST[answer.dtype]
    for name, exact in weights.items():
        got, want = answer.weights[name].double(), exact.double()
        bias = answer.biases.get(name, torch.zeros(len(want))).double().abs()[:, None]
        sizes = ROUNDINGS * (1 + u) * (want.abs() + bias) + of_row * want.abs().amax(1, keepdim=True)
        bound = u * sizes + least
        excess = ((got - want).abs() - bound).max().item()
        assert excess <= 0, f"{name}: a weight is off by {excess:.3g} more than rounding explains"


def check_answer(answer: Answer, made: Made, *, of_row: float = 0.0) -> None:
    """The peer loaded the folder, multiplies with our weights, predicts and writes what they predict."""
    assert answer.error is None, answer.error
    check_weights(answer, made.weights, of_row=of_row)
    check_predictions(answer, made.fake, of_row=of_row)


def check_predictions(answer: Answer, fake: Path, *, of_row: float = 0.0) -> None:
    """Logits near those of the dequantized model; each token written is the likeliest, or nearly so."""
    length = len(IDS)
    want = logits_of(fake, [*IDS, *answer.generated.tolist()])[0]
    bound = (LOGITS_ROUNDOFFS + 8 * of_row) * UNIT_ROUNDOFF[answer.dtype] * want.abs().max()
    difference = (answer.logits[0] - want[:length]).abs().max()
    assert difference <= bound, f"logits differ by {difference:.3g}, at most {bound:.3g} expected"
    assert len(answer.generated) == NEW_TOKENS
    following = want[length - 1 : -1]
    chosen = following.gather(1, answer.generated[:, None])[:, 0]
    assert (following.max(1).values - chosen <= 2 * bound).all(), "another text was generated"
