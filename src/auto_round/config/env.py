"""Environment variables: the table, and the only place that reads `os.environ`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from auto_round.errors import ConfigError, nearest

LOG_LEVELS: Final = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_CACHE: Final = "~/.cache/auto_round"
_YES: Final = ("1", "true", "yes", "on")
_NO: Final = ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: name, default as text, meaning."""

    name: str
    default: str
    help: str


VARIABLES: Final = (
    Variable("AR_LOG_LEVEL", "INFO", "least serious message shown: " + ", ".join(LOG_LEVELS)),
    Variable("AR_USE_MODELSCOPE", "0", "1: download models and data from ModelScope"),
    Variable(
        "AR_WORK_SPACE", "", "folder for the scratch files of `AutoRound.quantize()`; empty: the system's"
    ),
    Variable(
        "AR_CACHE",
        _CACHE,
        "folder of what is kept for later runs: programs compiled for this processor, scores that AutoScheme "
        "measured, text that models wrote (`--dataset self`), logits of originals (`eval --original`) and "
        "captions; where `XDG_CACHE_HOME` is set, `auto_round` below that by default",
    ),
    Variable("AR_OMP_NUM_THREADS", "", "CPU threads of the commands; empty: PyTorch's own choice"),
)


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment variables as values.

    Attributes:
        log_level: one of `LOG_LEVELS`.
        use_modelscope: download from ModelScope.
        work_space: folder for scratch files, None for the system's.
        num_threads: CPU threads, None for PyTorch's choice.
    """

    log_level: str = "INFO"
    use_modelscope: bool = False
    work_space: Path | None = None
    num_threads: int | None = None


def read_environment(source: Mapping[str, str] | None = None) -> Environment:
    """Read the variables of the table from `source`, by default the process environment.

    Raises:
        ConfigError: a variable holds something that it cannot mean.
    """
    table = os.environ if source is None else source
    texts = {variable.name: table.get(variable.name, variable.default).strip() for variable in VARIABLES}
    level = texts["AR_LOG_LEVEL"].upper() or "INFO"
    if level not in LOG_LEVELS:
        raise ConfigError(f"AR_LOG_LEVEL is {level!r}: {nearest(level, LOG_LEVELS)}")
    space = texts["AR_WORK_SPACE"]
    return Environment(
        log_level=level,
        use_modelscope=_switch("AR_USE_MODELSCOPE", texts["AR_USE_MODELSCOPE"]),
        work_space=Path(space) if space else None,
        num_threads=_count("AR_OMP_NUM_THREADS", texts["AR_OMP_NUM_THREADS"]),
    )


def unknown_variables(source: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the variables named `AR_...` that are set and mean nothing here."""
    table = os.environ if source is None else source
    known = {variable.name for variable in VARIABLES}
    return tuple(sorted(name for name in table if name.startswith("AR_") and name not in known))


ARITHMETIC: Final = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "OPENBLAS_CORETYPE",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
)
"""Variables of PyTorch's libraries that choose among programs whose sums differ in the last bit."""


def arithmetic_variables(source: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return those of `ARITHMETIC` that are set."""
    table = os.environ if source is None else source
    return {name: table[name] for name in ARITHMETIC if name in table}


_SHOWING: Final = ("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "HABANA_VISIBLE_MODULES")
"""Variables by which drivers show a process some accelerators only: NVIDIA's and AMD's, Intel's, Habana's."""


def show_accelerators(indices: Sequence[str]) -> None:
    """Let engines in processes of their own see these accelerators only.

    Args:
        indices: as this process counts them, which may itself see some of a machine's only.
    """
    for name in _SHOWING:
        seen = [part for part in os.environ.get(name, "").split(",") if part]
        inside = all(int(index) < len(seen) for index in indices)
        os.environ[name] = ",".join(seen[int(index)] if seen and inside else index for index in indices)


_KEPT_PRODUCTS: Final = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that tell oneDNN, and PyTorch's own layer above it, for how many products to keep programs."""


def keep_products(count: int) -> None:
    """Let both keep programs for so many products, unless the user has said another number.

    They read it once, at the first product of a process: later calls change nothing.
    """
    for name in _KEPT_PRODUCTS:
        os.environ.setdefault(name, str(count))


SPINS: Final = "2000"
"""How often a thread looks whether the others are done before it sleeps. PyTorch's OpenMP library looks for
milliseconds, on a core that the others may need: where other processes keep all cores busy, a run took more
than fifteen times as long as with one thread. Fewer looks than a thousand cost time where nothing else runs
(docs/LOG.md)."""
_WAITING: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables by which users say how threads wait. Source: libgomp's manual, "Environment Variables"."""


def says_how_threads_wait() -> bool:
    """Whether one of them is set."""
    return any(name in os.environ for name in _WAITING)


def wait_shortly() -> None:
    """Let threads that wait for others soon sleep, unless the user has said how they wait.

    It has to be called before PyTorch is imported: the library reads it once, when it is loaded.
    """
    if not says_how_threads_wait():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def process_variables() -> Mapping[str, str]:
    """Return all variables of this process, for what other programs say in theirs."""
    return os.environ


def cache_folder(source: Mapping[str, str] | None = None) -> Path:
    """Return this package's folder of caches, `AR_CACHE`: made anew when it is gone.

    Source of the default: XDG base directory specification 0.8, `XDG_CACHE_HOME`.

    Raises:
        RuntimeError: the user has no home.
    """
    table = os.environ if source is None else source
    own, all_caches = table.get("AR_CACHE", "").strip(), table.get("XDG_CACHE_HOME")
    found = Path(own) if own else Path(all_caches) / "auto_round" if all_caches else Path(_CACHE)
    return found.expanduser()


def environment_markdown() -> str:
    """Return the table of environment variables for the manual."""
    rows = [f"| `{v.name}` | {f'`{v.default}`' if v.default else ''} | {v.help} |" for v in VARIABLES]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _switch(name: str, text: str) -> bool:
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise ConfigError(f"{name} is {text!r}: expected 1 or 0")


def _count(name: str, text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} is {text!r}: expected a whole number above zero")
    return int(text)
