"""Does everything run on this GPU, what does a default run cost there, and how fast are the kernels?

    python benchmarks/gpu_check.py --out gpu.jsonl

One command for a machine with one NVIDIA GPU and a copy of this tree: nothing is installed or fetched. It
needs PyTorch, Transformers and Triton, and accelerate to load what was written; pytest and pytest-xdist if
they are there. Below nine minutes in all. In this order:

    machine     versions, bandwidth of a copy, rate of a large bfloat16 product
    tests       `pytest -m gpu`: kernels, widths and groups against the reference, tuning, whole runs,
                compiling; without pytest the kernels alone, through the conformance kit
    model       a default run (200 steps, 128 rows of 2048) of a random model of Qwen3-0.6B's shape
    block       the same of one block of Llama-3-8B's shape, plain and compiled
    ahead       the same of four blocks of Qwen3-0.6B's shape with targets computed ahead and without: what
                that saves beside the tuning, and on a second GPU where there is one
    triton, torch_int4, torch, marlin
                decode and prefill of a 4096 x 14336 matrix by each kernel, beside bfloat16 and the copy

Each line of the result is one JSON object, written as soon as it is known, to the standard output and to
`--out`. Each part is a process of its own in a time box: one that fails or does not end leaves a line with
what it said last ("what": "failed"), and the next begins. The exit code is 1 when a part failed. `--small`
rehearses all of it on a CPU: tiny sizes, and Triton's interpreter instead of its compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gpu_parts import (
    FAILURES,
    FULL,
    ROOT,
    SMALL,
    TAIL,
    Emit,
    Scale,
    ahead,
    block,
    linear,
    machine,
    model,
    refuse_without_gpu,
    tests,
)

SOURCES = ROOT / "src"
if str(SOURCES) not in sys.path:
    sys.path.insert(0, str(SOURCES))

PATIENCE_OF_SMALL = 20
"""A rehearsal may take so many times longer: its machine is busy with other tests, and interprets."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process.

    Attributes:
        name: of the part.
        work: what it does.
        until: seconds after the beginning of everything at which it is ended.
    """

    name: str
    work: Callable[[Emit, Scale], None]
    until: float


def _kernel(name: str, until: float) -> Part:
    return Part(name, lambda emit, scale: linear(emit, scale, name), until)


PARTS = (
    Part("machine", machine, 45),
    Part("tests", tests, 215),
    Part("model", model, 345),
    Part("block", block, 415),
    Part("ahead", ahead, 450),
    _kernel("triton", 475),
    _kernel("torch_int4", 500),
    _kernel("torch", 522),
    _kernel("marlin", 535),
)
"""Parts in their order. Time that one leaves over goes to the next."""


def run_process(
    name: str,
    command: list[str],
    seconds: float,
    write: Callable[[dict[str, Any]], None],
    variables: dict[str, str],
) -> bool:
    """Run the process of a part and hand on its lines; whether it ended well and in time."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=variables,
            start_new_session=True,  # what it starts itself is ended with it
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, seconds), end)
        timer.start()
        if process.stdout is not None:
            for line in process.stdout:
                write({"part": name, **as_row(line)})
        code = process.wait()
        timer.cancel()
        spent = round(time.perf_counter() - begun, 1)
        if code == 0:
            write({"part": name, "what": "done", "s": spent})
            return True
        said.seek(0)
        why = f"not done after {spent} s" if late.is_set() else ended(code)
        write({"part": name, "what": "failed", "s": spent, "why": why, "traceback": said.read()[-TAIL:]})
        return False


def as_row(line: str) -> dict[str, Any]:
    """A line as it was written; one that the end of its process cut off, as text."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {"what": "cut off", "text": line}


def ended(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def environment(*, small: bool) -> dict[str, str]:
    """Variables of the parts: this tree first, and for a rehearsal no GPU but the interpreter."""
    paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if small:
        found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    return found


def work_on(part: Part, scale: Scale) -> int:
    """The inside of a part's process: lines go to the parent, whatever else is printed to the error log."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def emit(what: str, **fields: Any) -> None:
            print(json.dumps({"what": what, **fields}), file=lines, flush=True)

        refuse_without_gpu(scale)
        part.work(emit, scale)
    return 1 if FAILURES else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file for the lines, beside the standard output")
    parser.add_argument("--small", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--only", help="parts to run, separated by commas")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = next(p for p in PARTS if p.name == options.part)
        return work_on(part, SMALL if options.small else FULL)
    names = options.only.split(",") if options.only else [p.name for p in PARTS]
    if unknown := sorted(set(names) - {p.name for p in PARTS}):
        parser.error(f"no part is called {unknown[0]}; there are {', '.join(p.name for p in PARTS)}")
    out = None if options.out is None else options.out.open("w", encoding="utf-8")
    try:
        return check([p for p in PARTS if p.name in names], out, small=options.small)
    finally:
        if out is not None:
            out.close()


def check(parts: list[Part], out: TextIO | None, *, small: bool) -> int:
    """Run parts one after another; 1 when one failed."""
    begun = time.perf_counter()
    failed = []

    def write(row: dict[str, Any]) -> None:
        for file in (sys.stdout, out):
            if file is not None:
                print(json.dumps(row), file=file, flush=True)

    script = [sys.executable, str(Path(__file__).resolve()), *(["--small"] if small else [])]
    for part in parts:
        left = part.until * (PATIENCE_OF_SMALL if small else 1) - (time.perf_counter() - begun)
        if not run_process(part.name, [*script, "--part", part.name], left, write, environment(small=small)):
            failed.append(part.name)
    write({"what": "end", "s": round(time.perf_counter() - begun, 1), "failed": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
