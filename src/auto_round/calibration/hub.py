"""Records of data sets on a hub: no code of theirs is run, and a hub out of reach fails at once."""

from __future__ import annotations

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from auto_round.calibration.local import Lazy, chain, read_path
from auto_round.calibration.registry import (
    DEFAULT_DATASET,
    LLAVA_REPOSITORY,
    PYTHON_DOCS,
    HubDataset,
)
from auto_round.errors import ConfigError
from auto_round.log import logger
from auto_round.models.hub import Platform

PROBE_SECONDS = 10.0

REMEDY = (
    f"use the built-in text (--dataset {PYTHON_DOCS}), a local file (--dataset path.jsonl), or the offline "
    "cache: fetch the data set once where there is a network, then set HF_HOME to that cache and "
    "HF_DATASETS_OFFLINE=1"
)

Records = Sequence[object] | Iterable[object]


def read_hub(row: HubDataset, splits: Sequence[str], platform: Platform) -> Records:
    """Return the records of some splits of a data set, one split after the other.

    Args:
        row: the data set; `row.names[0]` is its name on the hub.
        splits: splits to read; empty: those of the row.
        platform: "model_scope" asks ModelScope even for a data set registered elsewhere.

    Returns:
        A sequence, or for a streamed data set an iterable.

    Raises:
        ConfigError: the hub cannot be reached, or has no such data set, split or file that can be read.
    """
    from_modelscope = "model_scope" in (platform, row.platform)
    read = _read_modelscope if from_modelscope else _read_huggingface
    parts = read(row, tuple(splits) or row.splits)
    if row.streamed:
        return islice(_streamed(parts, row.names[0]), row.limit)
    whole = chain([Lazy(len(part), part.__getitem__) for part in parts])
    return whole if row.limit is None or len(whole) <= row.limit else Lazy(row.limit, whole.__getitem__)


def _streamed(parts: Sequence[Any], name: str) -> Iterator[object]:
    try:
        for part in parts:
            yield from part
    except _failures() as error:
        raise ConfigError(
            f"data set {name} broke off while it was read: {type(error).__name__}: {error}; or {REMEDY}"
        ) from error


def _read_huggingface(row: HubDataset, splits: Sequence[str]) -> list[Any]:
    import huggingface_hub.constants as hub

    name = row.names[0]
    datasets = _library(name)
    offline = bool(hub.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)
    if not offline and not is_reachable(f"{hub.ENDPOINT}/api/datasets/{name}"):
        if not is_cached(name, Path(datasets.config.HF_DATASETS_CACHE)):
            raise ConfigError(
                f"data set {name}: the hub {hub.ENDPOINT} cannot be reached, and it is not cached; {REMEDY}"
            )
        logger.warning(
            "data set %s: the hub cannot be reached, so its cached copy is used; "
            "HF_DATASETS_OFFLINE=1 skips the attempts to reach it",
            name,
        )
    # Version 3 of `datasets` still runs code from the hub unless told not to; later ones refuse the argument.
    options = {"trust_remote_code": False} if datasets.__version__.startswith("3.") else {}
    path, files = (name, None) if row.files is None else ("parquet", f"hf://datasets/{name}/{row.files}")
    parts = []
    for split in splits:
        try:
            parts.append(
                datasets.load_dataset(path, data_files=files, split=split, streaming=row.streamed, **options)
            )
        except _failures() as error:
            raise ConfigError(_failure(name, split, offline, error)) from error
    return parts


def _library(name: str) -> Any:
    """The package `datasets`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data set {name} comes from a hub, whose package is missing: pip install datasets; or {REMEDY}"
        ) from error
    return datasets


def _failures() -> tuple[type[Exception], ...]:
    """Return what the hub's clients raise, with the errors of whichever HTTP package they are built on."""
    from huggingface_hub.errors import HfHubHTTPError

    own: tuple[type[Exception], ...] = ()
    with suppress(ImportError):  # ModelScope can do without
        from datasets.exceptions import DatasetsError

        own = (DatasetsError,)
    return (*HfHubHTTPError.__bases__, *own, OSError, ValueError, RuntimeError, ImportError)


def _failure(name: str, split: str, offline: bool, error: Exception) -> str:
    first_line = str(error).partition("\n")[0]
    mode = " (offline mode: only the cache is read)" if offline else ""
    return f"data set {name}, split {split}{mode}: {type(error).__name__}: {first_line}; or {REMEDY}"


def _read_modelscope(row: HubDataset, splits: Sequence[str]) -> list[Any]:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise ConfigError(
            f"data set {row.names[0]} comes from ModelScope, whose package is missing: pip install "
            f"auto-round[modelscope]; or use --dataset {PYTHON_DOCS} or --dataset path.jsonl"
        ) from error
    parts = []
    for split in splits:
        try:
            parts.append(MsDataset.load(row.names[0], split=split, use_streaming=row.streamed))
        except _failures() as error:
            hint = (
                " (its copy of the Pile is swift/pile-val-backup)" if row.names[0] == DEFAULT_DATASET else ""
            )
            raise ConfigError(
                f"data set {row.names[0]}, split {split}, on ModelScope{hint}: {type(error).__name__}: "
                f"{error}; or use --dataset {PYTHON_DOCS} or --dataset path.jsonl"
            ) from error
    return parts


def read_llava(file: str) -> Records:
    """Conversations of one of LLaVA's data sets; their images lie elsewhere.

    Raises:
        ConfigError: the hub cannot be reached, and the file is not in its cache.
    """
    import huggingface_hub.constants as hub
    from huggingface_hub import hf_hub_download

    here = bool(hub.HF_HUB_OFFLINE) or not is_reachable(f"{hub.ENDPOINT}/api/datasets/{LLAVA_REPOSITORY}")
    try:
        found = hf_hub_download(LLAVA_REPOSITORY, file, repo_type="dataset", local_files_only=here)
    except _failures() as error:
        raise ConfigError(
            f"{file} of {LLAVA_REPOSITORY} cannot be fetched ({type(error).__name__}); copy it here once and "
            f"give its path (--dataset {file} --extra_data_dir FOLDER_OF_IMAGES)"
        ) from error
    return read_path(Path(found), ())


def is_reachable(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Tell whether something answers at `url`, whatever it answers, within `seconds`.

    One question before the hub's own client is asked, which retries for half a minute.
    """
    if not url.startswith(("http://", "https://")):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # Something answered; the hub's own client may trust other certificates than Python does.
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    except OSError:
        return False
    return True


def is_cached(name: str, cache: Path) -> bool:
    """Tell whether the folder of the `datasets` cache holds a data set, under its spelling of the name."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.casefold())

    return cache.is_dir() and any(
        plain(entry.name) == plain(name) for entry in cache.iterdir() if entry.is_dir()
    )
