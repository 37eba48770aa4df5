"""What is measured: a folder of Hugging Face's kind, quantized or not, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.errors import ConfigError, MissingError, UnsupportedError
from auto_round.export.gguf.library import gguf
from auto_round.export.hf_config import read_config
from auto_round.models.config_facts import CONTEXT_NAMES
from auto_round.models.hub import refuse_pipeline, resolve_model
from auto_round.stored.configuration import TEXT_CONFIGS

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
    def context(self) -> int | None:
        """Most tokens of a row, as the model says; None where it does not."""
        if self.is_gguf:
            fields = gguf().GGUFReader(self.path).fields
            found = fields.get(f"{fields['general.architecture'].contents()}.context_length")
            return None if found is None else int(found.contents())
        places = [self.config, *(self.config.get(name) for name in TEXT_CONFIGS)]
        lengths = [place.get(name) for place in places if isinstance(place, dict) for name in CONTEXT_NAMES]
        return next((length for length in lengths if isinstance(length, int) and length > 0), None)

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
        refuse_pipeline(path)
        found = (
            f"{len(files)} GGUF files: name one of them" if files else "neither config.json nor a GGUF file"
        )
        raise ConfigError(f"folder {path} holds {found}")
    folder = resolve_model(name, platform=platform, trust_remote_code=trust)
    return Subject(name, folder.absolute(), read_config(folder))


def find_source(
    named: str | None, subjects: Iterable[Subject | None], *, platform: str = "hf", trust: bool = False
) -> Path | None:
    """The folder whose model takes the weights of GGUF files: its classes, names and shapes are theirs.

    Args:
        named: what the user calls it; None for the first folder among the subjects, originals before others.
        subjects: models at hand.
        platform: where hub names are looked up.
        trust: also download model code.

    Returns:
        A folder; None where there is none, and where no GGUF file asks for one.

    Raises:
        ConfigError: the named one is not there, or is no folder.
    """
    there = [subject for subject in subjects if subject is not None]
    if not any(subject.is_gguf for subject in there):
        return None
    if named is not None:
        found = find_subject(named, platform=platform, trust=trust)
        if found.is_gguf:
            raise ConfigError(f"gguf_source {named} is a GGUF file: name the folder that it was made from")
        return found.path
    folders = [subject for subject in there if not subject.is_gguf]
    return next((s.path for s in sorted(folders, key=lambda s: not s.is_original)), None)


def _gguf(name: str, path: Path) -> Subject:
    if (part := _PART.search(path.name)) and int(part[1]) > 1:
        raise UnsupportedError(
            f"{path} is one of {part[1]} files of a model: join them with llama-gguf-split --merge"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    return Subject(name, path.absolute())
