"""C sources of this package as libraries, compiled on the machine that runs them.

A library is made once and kept in the user's cache folder under a name that follows from its source and
options. It shares the OpenMP threads of PyTorch, whose wheels bring the runtime that GCC links against; that
is why no other compiler is asked.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from auto_round.config.env import cache_folder
from auto_round.errors import Refusal
from auto_round.log import logger

OPTIONS = ("-std=gnu11", "-O3", "-fno-strict-aliasing", "-shared", "-fPIC", "-fopenmp")
"""What every source is compiled with."""

INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
"""PyTorch's name of what this CPU can do -> options of the compiler. Named one by one: a home folder may be
shared with machines that can do less."""

ROUNDING = ("-fno-math-errno", "-fno-trapping-math")
"""Without these, C compilers may call a function to round where one instruction would do."""

COMPILERS = ("gcc", "cc")
"""Names of compilers, best first."""

LIMIT_S = 600
"""Seconds after which a compiler counts as hanging. It takes up to ten of a core, of which a busy machine may
give it a tenth."""

FEW = 1 << 15
"""Numbers for which waking threads costs more than they save."""


def find_compiler() -> str | None:
    """Path of the compiler that programs of this package are made with; None where there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@functools.cache
def library(file: Path, options: tuple[str, ...]) -> ctypes.CDLL | Refusal:
    """The library of one source file, or why there is none.

    Args:
        file: the source, a file of this package.
        options: further options of the compiler, such as instruction sets.
    """
    compiler = find_compiler()
    if compiler is None:
        return Refusal(file.name, "no C compiler is here", "install gcc")
    try:
        return _load((compiler, *OPTIONS, *options, str(file)), file)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), "no message")
        return Refusal(file.name, f"{compiler} cannot compile it: {first.strip()}", "install gcc 11 or newer")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Refusal(file.name, f"cannot be compiled or loaded: {error}")


@functools.cache
def numeric_library(file: Path, options: tuple[str, ...], otherwise: str) -> ctypes.CDLL | None:
    """The library of one source file that rounds numbers, with this CPU's instructions.

    Args:
        file: the source, a file of this package.
        options: further options of the compiler.
        otherwise: what happens without it, for the log.

    Returns:
        None where it cannot be made, which is logged once.
    """
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())
    made = library(file, (*ROUNDING, *options, *instructions))
    if isinstance(made, Refusal):
        logger.info("%s: %s", otherwise, made)
        return None
    return made


def can_read(*tensors: Tensor) -> bool:
    """Whether programs can be given the addresses of these tensors.

    They are plain tensors, contiguous, on the host, and PyTorch's compiler is not looking.
    """
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.is_contiguous() for x in tensors
    )


def addresses(*tensors: Tensor | None) -> tuple[ctypes.c_void_p, ...]:
    """Where tensors lie, as arguments of a program or fields of a structure; null for None."""
    return tuple(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors)


def threads_for(count: int) -> int:
    """Threads for so many numbers."""
    return torch.get_num_threads() if count > FEW else 1


def _load(command: tuple[str, ...], source: Path) -> ctypes.CDLL:
    key = hashlib.sha256(_text(source) + "\0".join(command[1:-1]).encode()).hexdigest()[:16]
    name = f"{source.stem}-{key}.so"
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / name).exists():
            _compile(command, folder, name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError):  # no home, a full or read-only disk: compile for this process alone
        with tempfile.TemporaryDirectory() as folder_of_process:
            _compile(command, Path(folder_of_process), name)
            return ctypes.CDLL(str(Path(folder_of_process) / name))


def _text(source: Path) -> bytes:
    """A source with those of the package that it includes."""
    own = source.read_bytes()
    included = re.findall(r'^#include "(.+)"', own.decode(), re.MULTILINE)
    return b"".join([own, *(_text(source.with_name(name)) for name in included)])


def _compile(command: tuple[str, ...], folder: Path, name: str) -> None:
    """Make one library under its name at once, so that processes that start together never see half of it."""
    logger.info("compiling %s into %s, once for this machine", Path(command[-1]).name, folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        subprocess.run(
            (*command, "-o", str(made)), check=True, capture_output=True, text=True, timeout=LIMIT_S
        )
        made.replace(folder / name)
