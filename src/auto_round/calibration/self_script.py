"""What stands between the words of a model that writes text by itself: its start, and turns of a talk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.calibration.chat import NO_TEMPLATE, fill, with_system
from auto_round.calibration.grammar import DatasetItem
from auto_round.errors import ConfigError

_SAID = ("qfirstsaidq", "qthenansweredq", "qandthenaskedq")
"""Words that no template changes: found again, they show what it puts around them."""


@dataclass(frozen=True, slots=True)
class Script:
    """Tokens that the model is given, not asked for.

    Attributes:
        opening: before the first turn.
        behind: what comes in place of the end of a turn: of the first, of the second, and so on in turns.
        ends: tokens that end a turn.
        unspoken: special tokens that have no place inside of one.
    """

    opening: tuple[int, ...]
    behind: tuple[tuple[int, ...], ...]
    ends: frozenset[int]
    unspoken: frozenset[int]


def script_of(tokenizer: Any, config: Any, item: DatasetItem) -> Script:
    """The script of a model: a talk of user and assistant where it has a chat template, else plain text.

    The model speaks for both: what users ask is found in it too (Magpie, arXiv 2406.08464).

    Args:
        tokenizer: of the model.
        config: of the part of the model that reads text.
        item: may turn the template off, or bring a system message.

    Raises:
        ConfigError: no template where one is asked for, one that hides what is said, or no token to start
            with.
    """
    wants = item.apply_chat_template
    if wants and not tokenizer.chat_template:
        raise ConfigError(NO_TEMPLATE)
    stops = {*_ids(getattr(config, "eos_token_id", None)), *_ids(tokenizer.eos_token_id)}
    special = frozenset(tokenizer.all_special_ids)
    if tokenizer.chat_template and wants is not False:
        opening, behind = _talk(tokenizer, item.system_prompt)
        ends = frozenset(stops | ({turn[0] for turn in behind} & special))
    else:
        opening, behind = _plain(tokenizer, config, stops)
        ends = frozenset(stops)
    return Script(opening, behind, ends, special - ends)


def _ids(value: object) -> list[int]:
    """Token ids of a setting that holds one, several or none."""
    found = value if isinstance(value, Iterable) else [value]
    return [token for token in found if isinstance(token, int)]


def _plain(
    tokenizer: Any, config: Any, stops: Iterable[int]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...]]]:
    """The start of a text, and what lies between two of them."""
    known = (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), *sorted(stops))
    start = next((token for token in known if isinstance(token, int)), None)
    if start is None:
        raise ConfigError(
            'data set "self": neither the tokenizer nor the configuration has a token that text begins or '
            "ends with, so the model cannot begin; give text (--dataset FILE)"
        )
    end = next((token for token in sorted(stops) if token != start), start)
    return (start,), ((start,) if end == start else (end, start),)


def _talk(tokenizer: Any, system_prompt: str | None) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """What the template puts before what the user says, behind it, and behind the answer."""
    roles = ("user", "assistant", "user")
    said = [{"role": role, "content": words} for role, words in zip(roles, _SAID, strict=True)]
    text = fill(tokenizer, with_system(said, system_prompt))
    if any(text.count(words) != 1 for words in _SAID):
        raise ConfigError(
            'data set "self": the chat template does not show what is said as it is; write plain text '
            "(self:apply_chat_template=false)"
        )
    opening, rest = text.split(_SAID[0])
    _, rest = rest.split(_SAID[1])
    answered, asked = rest.split(_SAID[2])
    parts = [_tokens(tokenizer, part) for part in (opening, asked, answered)]
    if not all(parts):
        raise ConfigError(
            'data set "self": the chat template puts nothing between what is said; write plain text '
            "(self:apply_chat_template=false)"
        )
    return parts[0], (parts[1], parts[2])


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    found: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tuple(found)
