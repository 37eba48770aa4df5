"""Does a quantized model generate faster than its bfloat16 original on a CPU?

Builds a random Llama-shaped model in memory and its twin with packed linear layers, decodes with both in
turns in one process (so that a noisy machine slows both alike), and prints one JSON line a round and one with
the medians. With more threads than idle cores it measures the scheduler: give --threads then.

    python benchmarks/cpu_decode.py --layers 16 --hidden 2048 --bits 4
    python benchmarks/cpu_decode.py --layers 2 --hidden 1024 --scheme NVFP4
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from auto_round.export.compressed_config import compressed_layout
from auto_round.inference.qlinear import QuantLinear
from auto_round.kernels.kernel import LinearSpec, rounded_input
from auto_round.kernels.select import select_kernel
from auto_round.layouts.table import GPTQ_PLAIN
from auto_round.numerics.activation_float import CalibratedScale
from auto_round.numerics.presets import int_format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.scheme import parse_scheme


@dataclass(frozen=True)
class Shape:
    """The model and the scheme."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 5632
    vocabulary: int = 32000
    bits: int = 4
    group_size: int = 128
    asym: bool = False
    head: bool = False
    backend: str = "auto"
    scheme: str = ""
    """Floating scheme (MXFP4, FP8_STATIC, ...) in place of whole numbers."""


def original(shape: Shape) -> LlamaForCausalLM:
    """A bfloat16 model with random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 256,
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1)
        else:  # a repeated piece: random numbers would take longer than the benchmark
            piece = torch.randn(min(weight.numel(), 1 << 20), generator=generator) * weight.shape[-1] ** -0.5
            flat = weight.data.view(-1)
            for start in range(0, flat.numel(), piece.numel()):
                flat[start : start + piece.numel()] = piece[: flat.numel() - start]
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    return model.eval()


def packed_twin(model: LlamaForCausalLM, shape: Shape) -> LlamaForCausalLM:
    """The same model with the linear layers of its blocks (and, if asked, its head) quantized."""
    with torch.device("meta"):
        twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = model.model.rotary_emb
    fmt, layout, inputs = int_format(shape.bits, shape.group_size, sym=not shape.asym), GPTQ_PLAIN, None
    if shape.scheme:
        scheme = parse_scheme(shape.scheme)
        fmt, layout, inputs = scheme.weight_format(), compressed_layout(scheme), scheme.activation_format()
    number = inputs.fixed(4.0).number if isinstance(inputs, CalibratedScale) else None
    for name, module in list(twin.named_modules()):
        if isinstance(module, torch.nn.Linear) and (shape.head or name != "lm_head"):
            spec = LinearSpec(fmt, (module.out_features, module.in_features), torch.bfloat16, "cpu", inputs)
            packed = QuantLinear(spec, layout, select_kernel(spec, shape.backend), None)
            layer = QuantizedLayer(fmt.quantize(module.weight.detach()), number)
            for suffix, part in packed.stored.pack(layer).items():
                packed._buffers[suffix] = part
            packed.adopt(packed.kernel, spec)
            twin.set_submodule(name, packed)
    return twin.eval()


class Decoder:
    """One model in the middle of generating a text."""

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        start = time.perf_counter()
        self.logits = self._forward(prompt)
        self.prompt_seconds = time.perf_counter() - start

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits

    def decode(self, tokens: torch.Tensor) -> float:
        """Feed tokens one at a time; seconds."""
        start = time.perf_counter()
        for token in tokens:
            self.logits = self._forward(token.view(1, 1))
        return time.perf_counter() - start


def error(model: LlamaForCausalLM, twin: LlamaForCausalLM) -> float:
    """Largest difference between a packed layer and its dequantized weight, in units of |x| |W|^T."""
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    for module in twin.model.layers[0].modules():
        if isinstance(module, QuantLinear):
            x = torch.randn(3, module.in_features, generator=generator).bfloat16()
            x = rounded_input(x, module._kernel_buffers(), module.spec)  # rounding again changes nothing
            w = module.fmt.dequantize(module.restore().weight).double()
            with torch.inference_mode():
                difference = (module(x).double() - x.double() @ w.t()).abs() / (
                    x.double().abs() @ w.abs().t()
                )
            worst = max(worst, difference.max().item())
    return worst


def _nbytes(model: LlamaForCausalLM, *, packed: bool) -> int:
    """Bytes of the linear layers of the first block."""
    kind = QuantLinear if packed else torch.nn.Linear
    layers = [m for m in model.model.layers[0].modules() if isinstance(m, kind)]
    return sum(t.nbytes for m in layers for t in (m._buffers.values() if packed else m.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for field, value in asdict(Shape()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{field}", action="store_true")
        else:
            parser.add_argument(f"--{field}", type=type(value), default=value)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="tokens that each model decodes in a round")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--threads", type=int, default=None)
    options = vars(parser.parse_args())
    rounds, count, prompt_length, threads = (
        options.pop(k) for k in ("rounds", "tokens", "prompt", "threads")
    )
    if threads:
        torch.set_num_threads(threads)
    shape = Shape(**options)
    model = original(shape)
    twin = packed_twin(model, shape)
    about = {
        **asdict(shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": twin.model.layers[0].mlp.up_proj.kernel.name,
        "layer_error": None if shape.scheme.startswith("NV") else error(model, twin),
        "bytes_of_bf16": _nbytes(twin, packed=True) / _nbytes(model, packed=False),
    }
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(0, shape.vocabulary, (1, prompt_length), generator=generator)
    decoders = {"bf16": Decoder(model, prompt), "packed": Decoder(twin, prompt)}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for index in range(rounds + 1):
        tokens = torch.randint(0, shape.vocabulary, (count,), generator=generator)
        for name, decoder in decoders.items():
            seconds = decoder.decode(tokens)
            if index:  # the first round warms up
                times[name].append(seconds / count)
        if index:
            pair = {name: 1 / t[-1] for name, t in times.items()}
            print(json.dumps({"what": "round", "tokens_per_s": pair, "ratio": pair["packed"] / pair["bf16"]}))
    ratios = [b / p for b, p in zip(times["bf16"], times["packed"], strict=True)]
    print(
        json.dumps(
            {
                "what": "cpu_decode",
                "tokens_per_s": {name: 1 / statistics.median(t) for name, t in times.items()},
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "prompt_tokens_per_s": {n: prompt_length / d.prompt_seconds for n, d in decoders.items()},
                **about,
            }
        )
    )


if __name__ == "__main__":
    main()
