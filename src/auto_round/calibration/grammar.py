r"""The text that names calibration data, parsed with positions in its errors.

    spec := item ("," item)*
    item := name (":" option)*
    option := "split" "=" part ("+" part)*      which splits, joined in this order
            | "num" "=" integer                 how many samples of this item, at least 1
            | "concat" ["=" bool]               join the tokens of all samples, then cut
            | "apply_chat_template" ["=" bool]  wrap each sample in the tokenizer's chat template
            | "system_prompt" "=" text          the same, with this system message
            | part ("+" part)*                  older form of `split=`, only right after the name

Names and values may be quoted with `"` or `'`: then commas, colons and outer spaces belong to them, and `\"`,
`\\`, `\n` and `\t` mean what they mean in Python. Outside quotes a backslash is a plain character, and a
drive letter or `scheme://` belongs to the name, so that `C:\data\a.jsonl:num=8` needs no quotes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import NoReturn

from auto_round.errors import ConfigError, nearest

OPTIONS = ("split", "num", "concat", "apply_chat_template", "system_prompt")
_FLAGS = ("concat", "apply_chat_template")
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_ESCAPES = {'"': '"', "'": "'", "\\": "\\", "n": "\n", "t": "\t"}
_PART = re.compile(r"[\w.\-]+")
_NUMBER = re.compile(r"[0-9]{1,12}", re.ASCII)
_OWN_COLON = re.compile(r"[A-Za-z]:(?=[\\/])|[A-Za-z][\w+.\-]*:(?=//)", re.ASCII)


@dataclass(frozen=True, slots=True)
class DatasetItem:
    """One data set of a calibration mixture. `str(item)` is text that parses to an equal item.

    Attributes:
        name: registered name, hub name or local path.
        splits: splits to join, in order; empty: the data set's default.
        num: samples to take; None: an equal share of what the other items leave.
        concat: join all tokens and cut them in rows; None: the data set's default.
        apply_chat_template: wrap samples in the tokenizer's chat template; None: the data set's default.
        system_prompt: system message for the template; None: the template's own.
        position: where it begins in the parsed text, for messages; not compared.
    """

    name: str
    splits: tuple[str, ...] = ()
    num: int | None = None
    concat: bool | None = None
    apply_chat_template: bool | None = None
    system_prompt: str | None = None
    position: int = field(default=0, compare=False)

    def __str__(self) -> str:
        options = [
            "split=" + "+".join(self.splits) if self.splits else "",
            f"num={self.num}" if self.num is not None else "",
            f"concat={self.concat}".lower() if self.concat is not None else "",
            f"apply_chat_template={self.apply_chat_template}".lower()
            if self.apply_chat_template is not None and self.system_prompt is None
            else "",
            f"system_prompt={_quoted(self.system_prompt)}" if self.system_prompt is not None else "",
        ]
        return ":".join([_plain_or_quoted(self.name), *filter(None, options)])


def parse_dataset(text: str) -> tuple[DatasetItem, ...]:
    r"""Parse a data set specification.

    Args:
        text: for example `./a.jsonl, NeelNanda/pile-10k:num=256, mbpp:split=train+test:concat`.

    Returns:
        At least one item, in the order of the text.

    Raises:
        ConfigError: the text breaks the grammar; the message points at the place.
    """
    scanner = _Scanner(text)
    items = [_item(scanner)]
    while scanner.take(","):
        items.append(_item(scanner))
    if not scanner.at_end:
        scanner.fail("expected ',' between data sets or ':' before an option")
    return tuple(items)


class _Scanner:
    """Reads the text from left to right and knows how to point at a place in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    @property
    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def skip_spaces(self) -> None:
        while not self.at_end and self.text[self.position].isspace():
            self.position += 1

    def take(self, char: str) -> bool:
        self.skip_spaces()
        if self.text[self.position : self.position + 1] != char:
            return False
        self.position += 1
        return True

    def plain(self, stops: str) -> str:
        """Read up to one of the stop characters; outer spaces go."""
        start = self.position
        while not self.at_end and self.text[self.position] not in stops:
            self.position += 1
        return self.text[start : self.position].strip()

    def value(self, stops: str = ",:") -> str:
        """Read quoted text, or plain text up to a stop character."""
        self.skip_spaces()
        if self.text[self.position : self.position + 1] in ('"', "'"):
            return self._quoted()
        return self.plain(stops)

    def _quoted(self) -> str:
        start, quote = self.position, self.text[self.position]
        self.position += 1
        made = []
        while not self.at_end and self.text[self.position] != quote:
            char = self.text[self.position]
            follower = self.text[self.position + 1 : self.position + 2]
            if char == "\\" and follower in _ESCAPES:
                char = _ESCAPES[follower]
                self.position += 1
            made.append(char)
            self.position += 1
        if self.at_end:
            self.fail(f"this quote {quote} is never closed", start)
        self.position += 1
        return "".join(made)

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        """Raise a `ConfigError` that shows the line and a caret."""
        where = self.position if position is None else position
        shown = "".join(c if c.isprintable() else " " for c in self.text)
        raise ConfigError(f"data set, position {where + 1}: {message}\n    {shown}\n    {' ' * where}^")


def _item(scanner: _Scanner) -> DatasetItem:
    scanner.skip_spaces()
    start = scanner.position
    name = _name(scanner)
    if not name:
        scanner.fail("a data set's name is missing here", start)
    item = DatasetItem(name, position=start)
    seen: set[str] = set()
    while scanner.take(":"):
        item = _with_option(scanner, item, seen)
    if item.system_prompt is not None:
        if item.apply_chat_template is False:
            scanner.fail(
                "system_prompt needs the chat template that apply_chat_template=false turns off", start
            )
        item = replace(item, apply_chat_template=True)
    return item


def _name(scanner: _Scanner) -> str:
    own = _OWN_COLON.match(scanner.text, scanner.position)
    if own is None:
        return scanner.value()
    scanner.position = own.end()
    return own.group() + scanner.plain(",:")


def _with_option(scanner: _Scanner, item: DatasetItem, seen: set[str]) -> DatasetItem:
    scanner.skip_spaces()
    start = scanner.position
    word = scanner.plain(",:=")
    key = word.casefold().replace("-", "_")
    has_value = scanner.take("=")
    if not word:
        scanner.fail(f"an option is missing here; {nearest('', OPTIONS)}", start)
    if key not in OPTIONS:
        if has_value or seen or not _is_older_split(word):
            scanner.fail(f'unknown option "{word}"; {nearest(key, OPTIONS)}', start)
        seen.add("split")
        return replace(item, splits=_splits(scanner, word, start))
    if key in seen:
        scanner.fail(f'"{key}" is given twice', start)
    if not has_value and key not in _FLAGS:
        scanner.fail(f'"{key}" needs a value: {key}=...', start)
    seen.add(key)
    scanner.skip_spaces()
    place = scanner.position
    return _with_value(scanner, item, key, scanner.value() if has_value else "true", place)


def _with_value(scanner: _Scanner, item: DatasetItem, key: str, value: str, place: int) -> DatasetItem:
    if key == "split":
        return replace(item, splits=_splits(scanner, value, place))
    if key == "num":
        if not _NUMBER.fullmatch(value) or int(value) < 1:
            scanner.fail(f'num is a number of samples, at least 1; got "{value}"', place)
        return replace(item, num=int(value))
    if key == "system_prompt":
        return replace(item, system_prompt=value)
    if value.casefold() not in _BOOLS:
        scanner.fail(f'{key} is true or false; got "{value}"', place)
    flag = _BOOLS[value.casefold()]
    return replace(item, concat=flag) if key == "concat" else replace(item, apply_chat_template=flag)


def _splits(scanner: _Scanner, value: str, place: int) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in value.split("+"))
    for part in parts:
        if not _PART.fullmatch(part):
            scanner.fail(f'"{part}" is not the name of a split; splits look like train+validation', place)
    return parts


def _is_older_split(word: str) -> bool:
    """Tell `name:train` from a misspelt flag such as `name:concatt`."""
    return not difflib.get_close_matches(word.casefold(), OPTIONS, n=1, cutoff=0.8)


def _plain_or_quoted(name: str) -> str:
    plain = name == name.strip() and name.isprintable() and not re.search(r"[,:\"']", name)
    return name if plain else _quoted(name)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
