"""How near to the speed of memory do the GPU kernels come, and are they ever slower than bfloat16?

For each backend, shape, width and number of tokens: microseconds a call, the same for a bfloat16 matrix, and
the share of the bandwidth that a plain copy reaches in the same run. Calls rotate through as many weights as
exceed the second-level cache, since a model never multiplies the same matrix twice in a row. JSON lines.

    python benchmarks/gpu_linear.py --shapes 4096x14336,14336x4096 --tokens 1,8,64,256,2048
    python benchmarks/gpu_linear.py --tune        # candidates for kernels/triton_table.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from auto_round.errors import UnsupportedError
from auto_round.kernels import triton_table as table
from auto_round.kernels.kernel import LinearSpec
from auto_round.kernels.select import select_kernel
from auto_round.numerics.presets import int_format

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where everything runs; the CPU serves to rehearse the programs."""

CACHE = 256 << 20 if DEVICE == "cuda" else 0
"""Bytes of weights to rotate through: several times the second-level cache."""

SECONDS = 0.5
"""Time for one measurement, after which three repeats are enough."""


def microseconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median time of one call, from rounds through all calls.

    On a GPU between CUDA events, and recorded as one graph: without the host's time between launches.
    """
    for call in calls:
        call()
    if DEVICE == "cpu":
        return host_microseconds(calls, repeats)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return 1000 * start.elapsed_time(stop) / len(calls)

    return median_of(replay, repeats)


def median_of(measure: Callable[[], float], repeats: int) -> float:
    """Median of repeated measurements: fewer than wanted, but three at least, where each takes long."""
    begun, found = time.perf_counter(), []
    while len(found) < repeats and (len(found) < 3 or time.perf_counter() - begun < SECONDS):
        found.append(measure())
    return statistics.median(found)


def host_microseconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median time of one call on the host's clock, launches included."""

    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / len(calls)

    return median_of(once, repeats)


def copy_bandwidth(repeats: int, size: int = 1 << 30) -> float:
    """Bytes per second of a copy of `size` bytes, read and written bytes counted."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-6 * microseconds([lambda: target.copy_(source)], repeats))


def packed_calls(spec: LinearSpec, backend: str, x: torch.Tensor) -> tuple[list[Callable[[], object]], int]:
    """One call for each copy of a packed weight, and the bytes of one that are read."""
    kernel = select_kernel(spec, backend)
    q = spec.fmt.quantize(torch.randn(spec.shape, device=DEVICE))
    one = kernel.prepare(q, spec)
    size = sum(b.numel() * b.element_size() for b in one.values())
    weights = [{k: b.clone() for k, b in one.items()} for _ in range(max(1, CACHE // size))]
    return [lambda w=w: kernel.linear(x, w, spec, None) for w in weights], size


def bf16_calls(shape: tuple[int, int], x: torch.Tensor) -> list[Callable[[], object]]:
    """One call for each copy of a matrix."""
    one = torch.randn(shape, device=DEVICE).to(x.dtype)
    weights = [one.clone() for _ in range(max(1, CACHE // (2 * one.numel())))]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def candidates(tokens: int) -> Iterator[table.Tile]:
    """Tiles worth measuring."""
    if tokens == 1:
        for rows, columns, warps in itertools.product((1, 2, 4, 8), (128, 256, 512, 1024), (2, 4, 8)):
            yield table.Tile(rows, columns, 1, warps, 1)
    else:
        width = min(128, max(16, table.power_above(tokens)))
        for rows, columns, warps, stages in itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (2, 3, 4)):
            yield table.Tile(rows, columns, width, warps, stages)


def tune(spec: LinearSpec, tokens: int, repeats: int) -> None:
    """Print the time of each candidate, fastest last."""
    x = torch.randn(tokens, spec.shape[1], device=DEVICE).to(spec.dtype)
    kept = table.DECODE, table.PREFILL, table.FUSED_TOKENS
    found = []
    for tile in candidates(tokens):
        table.DECODE, table.PREFILL, table.FUSED_TOKENS = ((1 << 62, tile),), ((1 << 62, tile),), 1 << 30
        try:
            calls, _ = packed_calls(spec, "triton", x)
            found.append((microseconds(calls, repeats), tile))
        except Exception as error:  # noqa: BLE001 - too much shared memory, say: a class of Triton's own
            print(json.dumps({"what": "skipped", **asdict(tile), "why": str(error).partition("\n")[0]}))
    table.DECODE, table.PREFILL, table.FUSED_TOKENS = kept
    for spent, tile in sorted(found, key=lambda f: -f[0]):
        print(
            json.dumps(
                {"what": "tile", "shape": spec.shape, "tokens": tokens, "us": round(spent, 2), **asdict(tile)}
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="14336x4096,4096x14336,4096x4096,1024x4096")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,256,512,2048")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--backends", default="triton,torch_int4,marlin,torch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    bandwidth = copy_bandwidth(options.repeats)
    print(
        json.dumps(
            {
                "what": "machine",
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "copy_GB_per_s": round(bandwidth / 1e9),
            }
        )
    )
    shapes = [tuple(int(n) for n in text.split("x")) for text in options.shapes.split(",")]
    counts = [int(n) for n in options.tokens.split(",")]
    dtype = getattr(torch, options.dtype)
    for shape, tokens in itertools.product(shapes, counts):
        x = torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
        plain = microseconds(bf16_calls(shape, x), options.repeats)
        for bits in (int(b) for b in options.bits.split(",")):
            spec = LinearSpec(
                int_format(bits, options.group_size, sym=not options.asym), shape, dtype, "cuda"
            )
            if options.tune:
                tune(spec, tokens, options.repeats)
                continue
            for backend in options.backends.split(","):
                row = {"what": "linear", "out_in": shape, "tokens": tokens, "bits": bits, "backend": backend}
                try:
                    calls, size = packed_calls(spec, backend, x)
                    spent = microseconds(calls, options.repeats)
                except (UnsupportedError, RuntimeError) as error:
                    print(json.dumps({**row, "skipped": str(error).splitlines()[-1].strip(" -")}))
                    continue
                traffic = size + x.numel() * x.element_size() + tokens * shape[0] * x.element_size()
                print(
                    json.dumps(
                        {
                            **row,
                            "us": round(spent, 2),
                            "bf16_us": round(plain, 2),
                            "times_bf16": round(plain / spent, 3),
                            "share_of_copy": round(traffic / (1e-6 * spent) / bandwidth, 3),
                        }
                    )
                )


if __name__ == "__main__":
    main()
