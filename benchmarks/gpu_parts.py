"""What the parts of `gpu_check.py` do, each in a process of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 6000
"""Characters that are kept of what a failing test or call said."""

Emit = Callable[..., None]
"""Writes one line: `emit(what, key=value, ...)`."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is.

    Attributes:
        small: a rehearsal.
        rows: calibration rows that are tuned on.
        seqlen: tokens of a row.
        iters: tuning steps.
        matrix: outputs and inputs of the matrix that is timed.
        tokens: tokens of the timed calls.
        repeats: how often each is timed.
    """

    small: bool
    rows: int
    seqlen: int
    iters: int
    matrix: tuple[int, int]
    tokens: tuple[int, ...]
    repeats: int


FULL = Scale(False, 128, 2048, 200, (4096, 14336), (1, 16, 64, 4096), 20)
SMALL = Scale(True, 4, 16, 2, (16, 64), (1, 3), 1)

QWEN3_600M = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""Source: config.json of Qwen/Qwen3-0.6B."""
BLOCK_OF_8B = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""One block as in meta-llama/Meta-Llama-3-8B, between embeddings of a small vocabulary."""
SHRUNK = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def refuse_without_gpu(scale: Scale) -> None:
    """End a part that would take hours on a CPU."""
    import torch

    if not scale.small and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device; --small rehearses on a CPU")


def machine(emit: Emit, scale: Scale) -> None:
    """Versions and the two limits that everything is compared with."""
    import gpu_linear
    import torch

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("torch", "triton", "transformers", "accelerate", "safetensors", "pytest", "gptqmodel")
    found: dict[str, Any] = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_MiB": about.total_memory >> 20,
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    emit("versions", device=gpu_linear.DEVICE, **found)
    emit("limits", **limits(scale))


def limits(scale: Scale) -> dict[str, float]:
    """Bandwidth of a copy, bytes read and written, and rate of a square bfloat16 product."""
    import gpu_linear
    import torch

    copy = gpu_linear.copy_bandwidth(scale.repeats, 1 << (16 if scale.small else 30))
    n = 64 if scale.small else 8192
    x = torch.randn(n, n, device=gpu_linear.DEVICE).to(torch.bfloat16)
    product = 2 * n**3 / (1e-6 * gpu_linear.microseconds([lambda: x @ x.t()], scale.repeats))
    # Three digits, not decimals: on a busy processor the small copies of a rehearsal take milliseconds.
    return {
        "copy_GB_per_s": float(f"{copy / 1e9:.3g}"),
        "product_TFLOP_per_s": float(f"{product / 1e12:.3g}"),
    }


def tests(emit: Emit, scale: Scale) -> None:
    """Every test marked `gpu`; where there is no pytest, the kernels through their kit."""
    if importlib.util.find_spec("pytest") is None:
        emit("note", text="pytest is not installed: the kernels are checked without it")
        without_pytest(emit, scale)
        return
    import pytest

    class Lines:
        """Tells of each test as soon as it is done."""

        def __init__(self) -> None:
            self.counts: dict[str, int] = {}

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.outcome == "passed":
                return
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            failed = {"traceback": report.longreprtext[-TAIL:]} if report.failed else {}
            emit("test", test=report.nodeid, outcome=report.outcome, s=round(report.duration, 2), **failed)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                emit(
                    "test", test=report.nodeid, outcome="not collected", traceback=report.longreprtext[-TAIL:]
                )

    marked = re.compile(r"mark\.gpu|from accelerator import")
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if marked.search(p.read_text("utf-8"))]
    arguments = ["-m", "gpu", "-q", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and not scale.small:  # most of the time is compiling
        arguments += ["-n", str(min(12, os.cpu_count() or 1))]
    os.chdir(ROOT)
    lines = Lines()
    code = pytest.main([*arguments, *map(str, files)], plugins=[lines])
    emit("tests", **lines.counts)
    if code:
        raise SystemExit(f"pytest ended with code {int(code)}")


def without_pytest(emit: Emit, scale: Scale) -> None:
    """Every kernel of the table, width and group against the exact result."""
    from gpu_linear import DEVICE

    from auto_round.kernels.table import KERNELS
    from auto_round.testing import kernel_kit

    failed = 0
    for spec in list(kernel_kit.specs(DEVICE))[:: 35 if scale.small else 1]:
        for name, entry in KERNELS.items():
            if entry.kernel.refuses(spec) is not None:
                continue
            row = {"kernel": name, "format": spec.fmt.name, "shape": list(spec.shape)}
            try:
                share = kernel_kit.check_bound(entry.kernel, spec)
                kernel_kit.check_restore(entry.kernel, spec)
                emit("test", outcome="passed", **row, share_of_bound=round(share, 4))
            except Exception:  # noqa: BLE001 - whatever a kernel raises is the result
                failed += 1
                emit("test", outcome="failed", **row, traceback=traceback.format_exc()[-TAIL:])
    if failed:
        raise SystemExit(f"{failed} checks failed")


def model(emit: Emit, scale: Scale) -> None:
    """A default run of a whole model."""
    changes = {**SHRUNK, "num_hidden_layers": 2} if scale.small else {}
    quantized(emit, scale, "Qwen3-0.6B", {**QWEN3_600M, **changes})


def block(emit: Emit, scale: Scale) -> None:
    """A default run of one large block, plain and compiled."""
    config = {**BLOCK_OF_8B, **(SHRUNK if scale.small else {})}
    for compiled in (False,) if scale.small else (False, True):
        with going_on(emit, compiled=compiled):
            quantized(emit, scale, "block of 8B", config, enable_torch_compile=compiled)


def ahead(emit: Emit, scale: Scale) -> None:
    """What targets computed ahead save of a default run: beside the tuning, and on a second device."""
    import torch

    config = {**QWEN3_600M, **(SHRUNK if scale.small else {}), "num_hidden_layers": 2 if scale.small else 4}
    ways: list[dict[str, Any]] = [{"targets_ahead": "off"}, {"targets_ahead": "on"}]
    if torch.cuda.device_count() > 1:
        ways.append({"device_map": "auto"})
    for given in ways:
        with going_on(emit, **given):
            quantized(emit, scale, "4 blocks of Qwen3-0.6B", config, **given)


def quantized(emit: Emit, scale: Scale, name: str, config: dict[str, Any], **given: Any) -> None:
    """Quantize a random model and tell what it took, beside what the dry run says it would take."""
    import torch
    from gpu_linear import DEVICE

    from auto_round.config import build_options
    from auto_round.pipeline.deciding.fetch_rows import held_out_rows
    from auto_round.pipeline.deciding.fit import plan_memory, workload
    from auto_round.pipeline.deciding.prepare import prepare
    from auto_round.pipeline.estimate import estimate, measure_rates, operations
    from auto_round.pipeline.fitting.work import measure_sizes
    from auto_round.pipeline.quantize import run

    generator = torch.Generator().manual_seed(0)
    shape = (scale.rows + held_out_rows(scale.rows), scale.seqlen)
    rows = torch.randint(3, config["vocab_size"], shape, generator=generator).tolist()
    product = limits(scale)["product_TFLOP_per_s"]
    with tempfile.TemporaryDirectory() as folder:
        save_random(config, f"{folder}/model", DEVICE)
        settings = {"model": f"{folder}/model", "output_dir": f"{folder}/out", "device_map": DEVICE, **given}
        settings |= {"nsamples": scale.rows, "seqlen": scale.seqlen, "iters": scale.iters}
        if scale.small:
            settings |= {"group_size": 32, "not_use_best_mse": True}
        options = build_options(settings)
        job = prepare(options, dataset=rows, rows=False)
        work, memory = workload(job), job.memory_plan or plan_memory(job)
        expected, counted = estimate(work, memory, measure_rates(work)), operations(work, measure_sizes(work))
        emit(
            "expected",
            model=name,
            s=round(expected.seconds, 1),
            device_MiB=expected.device_bytes >> 20,
            TFLOP=round(counted / 1e12, 3),
        )
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def progress(event: Any) -> None:
            emit(
                "progress",
                model=name,
                stage=event.stage,
                label=event.label,
                done=f"{event.done}/{event.total}",
                s=round(event.seconds, 2),
                loss=event.loss,
                initial_loss=event.initial_loss,
                device_peak_MiB=device_peak(),
            )

        result = run(options, progress, dataset=rows)
    rate = counted / 1e12 / result.seconds
    verified = result.report.get("verified", {}).get("auto_round", {})
    emit(
        "run",
        model=name,
        **given,
        s=round(result.seconds, 2),
        device_peak_MiB=device_peak(),
        host_peak_MiB=result.peak_bytes >> 20,
        TFLOP_per_s=round(rate, 3),
        share_of_product=round(rate / product, 4) if product else None,
        kl_of_reloaded=verified.get("kl"),
        skipped=verified.get("skipped"),
    )


def device_peak() -> int | None:
    """Most memory of tensors on the GPU so far, MiB; None without one."""
    import torch

    return torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None


def save_random(config: dict[str, Any], folder: str, device: str) -> None:
    """Write a model of a shape with the weights that it is born with."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        born = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    born.save_pretrained(folder)
    del born
    if device == "cuda":
        torch.cuda.empty_cache()


def linear(emit: Emit, scale: Scale, backend: str) -> None:
    """Times of one kernel for few and many tokens."""
    import gpu_linear
    import torch

    from auto_round.errors import UnsupportedError
    from auto_round.kernels.kernel import LinearSpec
    from auto_round.numerics.presets import int_format

    n_out, n_in = scale.matrix
    # The interpreter multiplies tiles of float16 only.
    dtype = torch.float16 if scale.small else torch.bfloat16
    bound = limits(scale)
    for shape in ((n_out, n_in), (n_in, n_out)):
        spec = LinearSpec(
            int_format(4, 32 if scale.small else 128, sym=True), shape, dtype, gpu_linear.DEVICE
        )
        for tokens in scale.tokens:
            row = {"kernel": backend, "out_in": list(shape), "tokens": tokens}
            with going_on(emit, **row):
                x = torch.randn(tokens, shape[1], device=gpu_linear.DEVICE).to(dtype)
                try:
                    calls, size = gpu_linear.packed_calls(spec, backend, x)
                except UnsupportedError as error:
                    emit("linear", **row, skipped=str(error).splitlines()[-1].strip(" -"))
                    continue
                spent = gpu_linear.microseconds(calls, scale.repeats)
                host = gpu_linear.host_microseconds(calls, scale.repeats)
                plain = gpu_linear.microseconds(gpu_linear.bf16_calls(shape, x), scale.repeats)
                traffic = size + (x.numel() + tokens * shape[0]) * x.element_size()
                rate = 2 * tokens * shape[0] * shape[1] / (1e-6 * spent) / 1e12
                emit(
                    "linear",
                    **row,
                    us=round(spent, 2),
                    us_from_the_host=round(host, 2),
                    bf16_us=round(plain, 2),
                    times_bf16=round(plain / spent, 3),
                    share_of_copy=round(traffic / (1e-6 * spent) / 1e9 / bound["copy_GB_per_s"], 3),
                    TFLOP_per_s=round(rate, 3),
                )


@contextmanager
def going_on(emit: Emit, **row: Any) -> Iterator[None]:
    """Write what fails inside as a line and go on."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever is raised is the result
        emit("failed", **row, traceback=traceback.format_exc()[-TAIL:])
        FAILURES.append(row)


FAILURES: list[dict[str, Any]] = []
"""What failed in this process without ending it."""
