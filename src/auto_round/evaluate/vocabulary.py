"""Whether two models speak of the same tokens: without that their predictions cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from auto_round.errors import ConfigError
from auto_round.evaluate.subject import Subject
from auto_round.export.gguf.library import gguf
from auto_round.models.tokenizers import refuse_empty
from auto_round.schemes.gguf_types import EMBEDDING
from auto_round.stored.configuration import TEXT_CONFIGS

_SAME: Final = 0.99
"""Share of a GGUF file's tokens that must be spelled as in the tokenizer: converters respell a few added
ones."""
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of a model.

    Attributes:
        width: logits of a position; None where the configuration does not say.
        spelled: id -> spelling; empty where there is no tokenizer.
        exact: whether spellings are the tokenizer's own.
    """

    width: int | None
    spelled: Mapping[int, str]
    exact: bool = True


def load_tokenizer(subject: Subject, named: str | None, *, trust: bool = False) -> Any:
    """The tokenizer of a model, or the one that the user names.

    Raises:
        ConfigError: there is none that Transformers loads.
    """
    from transformers import AutoTokenizer

    where: Path | str = named or subject.path
    settings: dict[str, Any] = {"trust_remote_code": trust}
    if named is None and subject.is_gguf:
        where, settings["gguf_file"] = subject.path.parent, subject.path.name
    try:
        found = AutoTokenizer.from_pretrained(where, **settings)
        refuse_empty(found)
        return found
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"no tokenizer in {named or subject.path} that Transformers loads ({type(error).__name__}: "
            f"{said[0][:200] if said else ''}); name one with --tokenizer"
        ) from error


def check_same_vocabulary(first: Subject, second: Subject, *, trust: bool = False) -> None:
    """Refuse two models whose logits mean different tokens.

    Raises:
        ConfigError: the widths differ, or an id stands for different tokens.
    """
    one, two = vocabulary_of(first, trust=trust), vocabulary_of(second, trust=trust)
    advice = "only models with the same vocabulary can be compared"
    if one.width and two.width and one.width != two.width:
        raise ConfigError(
            f"{first.name} has a vocabulary of {one.width} tokens and {second.name} one of {two.width}: "
            + advice
        )
    ids = one.spelled.keys() & two.spelled.keys()
    other = sorted(i for i in ids if one.spelled[i] != two.spelled[i])
    exact = one.exact and two.exact
    if exact and one.spelled and two.spelled:
        other = sorted({*other, *(one.spelled.keys() ^ two.spelled.keys())})
    if other and (exact or len(other) > (1 - _SAME) * len(ids)):
        shown = "; ".join(f"{i}: {one.spelled.get(i)!r} and {two.spelled.get(i)!r}" for i in other[:_SHOWN])
        raise ConfigError(
            f"{first.name} and {second.name} mean different tokens by {len(other)} ids ({shown}): {advice}"
        )


def vocabulary_of(subject: Subject, *, trust: bool = False) -> Vocabulary:
    """Tokens of a model, read from its configuration and tokenizer."""
    if subject.is_gguf:
        return _of_gguf(subject)
    return Vocabulary(_width(subject.config), _spellings(subject, trust))


def _width(config: Mapping[str, Any]) -> int | None:
    places = [config, *(config[name] for name in TEXT_CONFIGS if isinstance(config.get(name), dict))]
    return next((int(place["vocab_size"]) for place in places if place.get("vocab_size")), None)


def _spellings(subject: Subject, trust: bool) -> dict[int, str]:
    try:
        tokenizer = load_tokenizer(subject, None, trust=trust)
    except ConfigError:
        return {}
    return {number: text for text, number in tokenizer.get_vocab().items()}


def _of_gguf(subject: Subject) -> Vocabulary:
    reader = gguf().GGUFReader(subject.path)
    embedding = next((t for t in reader.tensors if t.name == EMBEDDING), None)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    width = None if embedding is None else int(embedding.shape[-1])
    return Vocabulary(width, {} if tokens is None else dict(enumerate(tokens.contents())), exact=False)
