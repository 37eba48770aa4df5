"""What is measured: a folder of Hugging Face's kind, quantized or not, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, MissingError, UnsupportedError
from auto_round.export.gguf.library import gguf
from auto_round.export.hf_config import read_config
from auto_round.models.hub import resolve_model

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_NO_MODEL = re.compile(r"(^|[-_.])(mmproj|imatrix)([-_.]|$)")
"""GGUF files beside a model that are none themselves."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model on disk.

    Attributes:
        name: as the user gave it.
        path: its folder, or the GGUF file.
        config: `config.json`; empty for a GGUF file.
    """

    name: str
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.is_file()

    @property
    def method(self) -> str | None:
        """Its `quant_method`; None where it looks unquantized."""
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        return None if method is None else str(method)

    @property
    def is_original(self) -> bool:
        """Whether it is a folder of weights as they were trained."""
        return not self.is_gguf and "quantization_config" not in self.config


def find_subject(name: str, *, platform: str = "hf", trust: bool = False) -> Subject:
    """The model that a user means; a hub name is downloaded.

    Args:
        name: folder, hub name, GGUF file, or a folder that holds one GGUF file.
        platform: where hub names are looked up.
        trust: also download model code.

    Raises:
        ConfigError: there is no such model.
        UnsupportedError: a model in several GGUF files.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise MissingError(f'no file "{name}"')
        return _gguf(name, path)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(p for p in path.glob("*.gguf") if not _NO_MODEL.search(p.stem.casefold()))
        if len(files) == 1:
            return _gguf(name, files[0])
        found = (
            f"{len(files)} GGUF files: name one of them" if files else "neither config.json nor a GGUF file"
        )
        raise ConfigError(f"folder {path} holds {found}")
    folder = resolve_model(name, platform=platform, trust_remote_code=trust)
    return Subject(name, folder, read_config(folder))


def _gguf(name: str, path: Path) -> Subject:
    if (part := _PART.search(path.name)) and int(part[1]) > 1:
        raise UnsupportedError(
            f"{path} is one of {part[1]} files of a model: join them with llama-gguf-split --merge"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    return Subject(name, path)


def gguf_text(subject: Subject, key: str) -> Any:
    """A value of a GGUF file's metadata; None where it has none."""
    entry = gguf().GGUFReader(subject.path).fields.get(key)
    return None if entry is None else entry.contents()
