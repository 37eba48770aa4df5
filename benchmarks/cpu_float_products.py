"""How long do packed FP4 and FP8 weights take on a CPU, beside PyTorch's products with plain ones?

Multiplies a matrix in each form by 1, 4, 16 and 64 tokens, one form after the other in every round, on the
processor time of this process; prints one JSON line a number of tokens with the medians in ns a weight, and
each packed form over bfloat16 and over float32 of the same round.

    python benchmarks/cpu_float_products.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.schemes.scheme import parse_scheme

SCHEMES = ("MXFP4", "NVFP4", "MXFP8", "FPW8A16", "FP8_BLOCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 16, 64))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto", help="torch for the reference")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    w = torch.randn(options.size, generator=torch.Generator().manual_seed(0)) * 0.02
    plain = {"bfloat16": w.bfloat16(), "float32": w}
    kernels, packed = {}, {}
    for scheme in SCHEMES:
        fmt = parse_scheme(scheme).weight_format()
        spec = LinearSpec(fmt, tuple(options.size), torch.bfloat16, "cpu")
        kernel = select_kernel(spec, options.backend)
        kernels[scheme] = kernel.name
        packed[scheme] = (kernel, kernel.prepare(fmt.quantize(w), spec), spec)

    def product(name: str, x: Tensor) -> Callable[[], Tensor]:
        if name in plain:
            return lambda: torch.nn.functional.linear(x.to(plain[name].dtype), plain[name])
        kernel, buffers, spec = packed[name]
        return lambda: kernel.linear(x, buffers, spec, None)

    for tokens in options.tokens:
        x = torch.randn(tokens, options.size[1], generator=torch.Generator().manual_seed(1)).bfloat16()
        runs = {name: product(name, x) for name in (*plain, *SCHEMES)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(options.rounds + 1):
            for name, run in runs.items():
                seconds = _seconds(run)
                if index:  # the first round warms up
                    times[name].append(seconds)
        found = {
            "what": "cpu_float_products",
            "tokens": tokens,
            "ns_a_weight": {n: round(statistics.median(t) / w.numel() * 1e9, 3) for n, t in times.items()},
            **{f"over_{base}": _ratios(times, base) for base in plain},
            "kernels": kernels,
            "size": list(options.size),
            "threads": options.threads,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        print(json.dumps(found), flush=True)


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _ratios(times: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of each packed form's time over another's."""
    return {
        name: round(statistics.median(a / b for a, b in zip(times[name], times[base], strict=True)), 2)
        for name in SCHEMES
    }


if __name__ == "__main__":
    main()
