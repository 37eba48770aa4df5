"""Model names: a local folder, or a download from Hugging Face or ModelScope."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from auto_round.errors import ConfigError, MissingError, nearest

Platform = Literal["hf", "model_scope"]
PLATFORMS: tuple[Platform, ...] = ("hf", "model_scope")

_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# Second copies of the weights: other frameworks' folders, and Mistral's own layout beside the usual one.
_UNWANTED = ("*/*.safetensors", "consolidated*.safetensors")
PIPELINE_INDEX = "model_index.json"
"""File by which the folder of a pipeline of diffusers is known."""

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    name_or_path: str | Path,
    *,
    platform: str = "hf",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of a model, downloaded first unless it is local; a GGUF file stands for itself.

    Only safetensors, configuration and tokenizer files are downloaded; Python files only with
    `trust_remote_code`. Files in the hub's cache are used again, and found without a network.

    Args:
        name_or_path: a folder, or a name such as `Qwen/Qwen3-0.6B`.
        platform: where names are looked up, `hf` or `model_scope`.
        revision: branch, tag or commit; None for the main one.
        trust_remote_code: also download the model's own code.

    Raises:
        ConfigError: no such folder or name, no access, no network, unknown platform, or the platform's
            package is not installed.
    """
    if platform not in PLATFORMS:
        raise ConfigError(f'unknown platform "{platform}"; {nearest(platform, PLATFORMS)}')
    name = str(name_or_path)
    path = Path(name_or_path).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise ConfigError(
            f'"{name}" is a file; expected the folder that holds config.json and the weights, or a .gguf file'
        )
    if name.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(name):
        raise MissingError(
            f'no folder "{name}"; expected a model folder, or a name such as "Qwen/Qwen3-0.6B"'
        )
    patterns = [*_WANTED, *(["*.py"] if trust_remote_code else [])]
    download = _from_hugging_face if platform == "hf" else _from_model_scope
    return download(name, revision, patterns)


def resolve_pipeline(name_or_path: str | Path, platform: str = "hf") -> Path:
    """The folder of a pipeline of diffusers, downloaded first unless it is local; its components come along.

    Raises:
        ConfigError: as for `resolve_model`.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir() or not _REPOSITORY.fullmatch(str(name_or_path)):
        return resolve_model(name_or_path, platform=platform)
    download = _from_hugging_face if platform == "hf" else _from_model_scope
    patterns = ["*.json", "*.txt", "*/*.safetensors", "*/*.model", "*/*.jinja"]
    return download(str(name_or_path), None, patterns, ["*fp16.safetensors", "*bf16.safetensors"])


def holds_pipeline(name: str, platform: str = "hf") -> bool:
    """Whether a folder, or a name on Hugging Face, is a pipeline of diffusers rather than a model.

    A hub is asked only for names that are not in its cache; a pipeline has no configuration at its top.
    """
    path = Path(name).expanduser()
    if path.is_dir() or platform != "hf" or name.startswith((".", "/", "~")) or "/" not in name:
        return (path / PIPELINE_INDEX).is_file()
    if not _REPOSITORY.fullmatch(name):
        return False
    from huggingface_hub import HfApi, try_to_load_from_cache

    known = {file: try_to_load_from_cache(name, file) for file in (PIPELINE_INDEX, "config.json")}
    if any(isinstance(found, str) for found in known.values()):
        return isinstance(known[PIPELINE_INDEX], str)
    try:  # one question that is not asked again: a download would try for half a minute without a network
        files = HfApi().model_info(name, timeout=10).siblings or []
    except Exception:  # noqa: BLE001  whatever is wrong with the name is said when the model is fetched
        return False
    return any(file.rfilename == PIPELINE_INDEX for file in files)


def refuse_pipeline(folder: Path) -> None:
    """Refuse the folder of a pipeline where a model is wanted.

    Raises:
        MissingError: it is one.
    """
    if (folder / PIPELINE_INDEX).is_file():
        raise MissingError(
            f"{folder} is a pipeline of diffusers, not a model: --dry_run shows what it consists of, "
            "its report.json what was made of it"
        )


def _from_hugging_face(
    name: str, revision: str | None, patterns: list[str], left_out: Sequence[str] = _UNWANTED
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(left_out)
        )
    except GatedRepoError as error:
        raise ConfigError(
            f'access to "{name}" on Hugging Face is restricted; accept its terms on its page, '
            'then log in with "hf auth login" or set HF_TOKEN'
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingError(
            f'no folder and no Hugging Face model "{name}"; check the spelling, give a local folder, '
            'or for a private model log in with "hf auth login" or set HF_TOKEN'
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f'"{name}" on Hugging Face has no revision "{revision}"') from error
    except LocalEntryNotFoundError as error:
        raise MissingError(
            f'"{name}" is neither a folder nor in the local cache, and Hugging Face cannot be reached '
            "(no network, or HF_HUB_OFFLINE is set); give a local folder, or download the model once with "
            f'"hf download {name}" on a machine with a network and copy the folder'
        ) from error
    except (HTTPError, OSError, ValueError) as error:
        raise ConfigError(f'cannot download "{name}" from Hugging Face: {_first_line(error)}') from error
    return Path(folder)


def _from_model_scope(
    name: str, revision: str | None, patterns: list[str], left_out: Sequence[str] = _UNWANTED
) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.errors import FileDownloadError, NotExistError, RequestError
    except ImportError as error:
        raise ConfigError(
            f'cannot look up "{name}" on ModelScope: the package "modelscope" is not installed; '
            'install it with: pip install "auto-round[modelscope]"'
        ) from error
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(left_out)
        )
    except (NotExistError, RequestError, FileDownloadError, OSError, ValueError) as error:
        raise ConfigError(
            f'cannot download "{name}" from ModelScope: {_first_line(error)}; '
            "check the name and the network, or give a local folder"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().split("\n", 1)[0]
