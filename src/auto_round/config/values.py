"""What users may write for an option that is more than one word: lists, sizes, devices, layer rules."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TOKEN = re.compile(r"""\s*(?:(?P<mark>[{}:,])|(?P<text>"[^"]*"|'[^']*')|(?P<word>[^\s{}:,"']+))""")


FROM_PYTHON = "given from Python"
"""End of what stands in place of a value that is an object: `list given from Python`."""


def names(value: Any) -> tuple[str, ...]:
    """Turn `"a, b"`, `["a", "b"]` or `[["a"], ["b"]]` into `("a", "b")`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, Iterable):
        raise TypeError(f"expected a comma list or a list of names, got {type(value).__name__}")
    return tuple(name for part in value for name in names(part))


def comma_list(value: Any) -> Any:
    """Turn `["a", "b"]` into `"a,b"`; what is no list of names stays as it is."""
    if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
        return ",".join(value)
    return value


def numbers(value: Any) -> tuple[float, ...]:
    """Turn `"2.5,3"`, `3`, or a list of numbers into numbers above zero."""
    parts = names(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    found = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int | float):
            raise TypeError("expected numbers such as 3 or 2.5,3,4")
        try:
            number = float(part)
        except ValueError:
            raise ValueError("expected numbers such as 3 or 2.5,3,4") from None
        if not 0 < number < float("inf"):
            raise ValueError("expected numbers above zero")
        found.append(number)
    return tuple(dict.fromkeys(found))


def sizes(value: Any) -> tuple[int, ...]:
    """Turn `"4.2GB,5GB"`, a number of bytes, or a list of them into bytes."""
    parts = names(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(size_bytes(part) for part in parts))


def schemes(value: Any) -> tuple[Any, ...]:
    """Turn text, one scheme, or a list of schemes into schemes, which are read later.

    Text is a comma list of names, and of fields in braces: `W2A16,{bits:3,group_size:64}`; JSON works too.
    """
    if isinstance(value, str):
        return _listed_schemes(value)
    if isinstance(value, Mapping):
        return (value,)
    if not isinstance(value, Iterable):
        raise TypeError("expected a comma list or a list of schemes")
    return tuple(scheme for part in value for scheme in schemes(part))


def _listed_schemes(text: str) -> tuple[Any, ...]:
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    if not {*inner} & {*"{}\"'"}:
        return names(inner)
    tokens, found, at = _tokens(inner), list[Any](), 0
    while at < len(tokens):
        if _marks(tokens, at, ","):
            at += 1
            continue
        value, at = _value(tokens, at)
        found.append(value)
        if at < len(tokens) and not _marks(tokens, at, ","):
            raise _unexpected(tokens[at])
    return tuple(found)


def name_groups(value: Any) -> tuple[tuple[str, ...], ...]:
    """Turn `[["a", "b"], ["c d"]]`, or `["a", "b"]` for one set, into sets of names."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError('expected a list of lists of layer names or patterns, such as [["q_proj", "k_proj"]]')
    parts = list(value)
    groups = [parts] if parts and all(isinstance(part, str) for part in parts) else parts
    return tuple(found for group in groups if (found := names(group)))


def size_bytes(value: Any) -> int:
    """Turn `"5GB"`, `"512 MiB"` or a number of bytes into bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError('expected a size such as "5GB", "512MB" or "512MiB"')
        number, unit = float(match[1]), match[2].upper()
    count = int(number * _UNITS[unit])
    if count <= 0:
        raise ValueError('expected a size above zero such as "5GB"')
    return count


def folders_by_kind(text: str) -> dict[str, str]:
    """Turn `"image=FOLDER,video=FOLDER"` into folders by kind; text without `=` is the folder of images."""
    if "=" not in text:
        return {"image": text}
    return {kind.strip(): folder for kind, _, folder in (part.partition("=") for part in text.split(","))}


def whole_path(text: str) -> str:
    """The path as an absolute one where something is there; else the text, which may be a name on a hub."""
    return str(Path(text).absolute()) if text and not text.startswith("~") and Path(text).exists() else text


def device(value: Any) -> Any:
    """Turn `0`, `"cuda:0"`, `"0,1"`, a `torch.device` or a mapping into text, or a mapping of text."""
    if isinstance(value, Mapping):
        return {str(key): str(device(part)) for key, part in value.items()}
    if isinstance(value, bool):
        raise TypeError('expected a device such as "cpu", "cuda:0" or 0')
    return str(value)


def device_or_none(value: Any) -> Any:
    """The same; nothing stands for nothing."""
    return None if value is None else device(value)


def layer_rules(value: Any) -> Mapping[str, Any]:
    """Turn JSON, relaxed text such as `{k_proj:{bits:8}}`, a `.json` path or a mapping into a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".json")):
        value = _text_of(Path(value))
    if not isinstance(value, str) or not value.strip():
        raise TypeError("expected a mapping of layer name to scheme, JSON or a .json file")
    try:
        rules = json.loads(value, object_pairs_hook=_each_once)
    except json.JSONDecodeError:
        rules = _relaxed(value)
    if not isinstance(rules, dict):
        raise TypeError('expected {"layer name": scheme, ...}')
    if "made_by" not in rules:
        return rules
    inside = rules.get("layer_config")  # a plan that AutoScheme wrote says more than rules
    if not isinstance(inside, dict):
        raise TypeError(
            'expected a plan of AutoScheme ("made_by") with "layer_config": {"layer name": scheme, ...}'
        )
    return inside


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of names and values; a name that is given twice would lose its first value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{key}" is given twice; leave one of them out')
        found[key] = value
    return found


def _text_of(path: Path) -> str:
    """Text of a file of rules."""
    if path.is_dir():
        raise ValueError("it is a folder; expected a .json file")
    if not path.is_file():
        raise FileNotFoundError(f"no such file; relative paths begin at {Path.cwd()}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("it holds no text; expected JSON in UTF-8") from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None


def _relaxed(text: str) -> Any:
    """Read JSON-like text whose words need no quotes."""
    tokens = _tokens(text)
    value, rest = _value(tokens, 0)
    if rest != len(tokens):
        raise _unexpected(tokens[rest])
    return value


def _unexpected(token: tuple[str, str, int]) -> ValueError:
    return ValueError(f"unexpected {token[1]!r} at character {token[2] + 1}")


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """Kind, text and place of each mark, quoted text and word."""
    tokens: list[tuple[str, str, int]] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"unclosed quote at character {at + 1}")
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind], match.start(kind)))
        at = match.end()
    return tokens


def _value(tokens: list[tuple[str, str, int]], at: int) -> tuple[Any, int]:
    if at >= len(tokens):
        raise ValueError("the text ends too early")
    kind, text, _ = tokens[at]
    if kind == "text":
        return text[1:-1], at + 1
    if kind == "word":
        # A scheme name may hold a colon ("GGUF:Q6_K").
        if _marks(tokens, at + 1, ":") and at + 2 < len(tokens) and tokens[at + 2][0] == "word":
            return f"{text}:{tokens[at + 2][1]}", at + 3
        return _word(text), at + 1
    if text != "{":
        raise _unexpected(tokens[at])
    return _mapping(tokens, at + 1)


def _mapping(tokens: list[tuple[str, str, int]], at: int) -> tuple[Any, int]:
    pairs: list[tuple[str, Any]] = []
    while not _marks(tokens, at, "}"):
        if at >= len(tokens):
            raise ValueError('a closing "}" is missing')
        kind, key, where = tokens[at]
        if kind == "mark" or not _marks(tokens, at + 1, ":"):
            raise ValueError(f'expected "name: value" at character {where + 1}')
        value, at = _value(tokens, at + 2)
        pairs.append((key[1:-1] if kind == "text" else key, value))
        if _marks(tokens, at, ","):
            at += 1
        elif not _marks(tokens, at, "}"):
            raise ValueError(
                'expected "," or "}" '
                + (f"at character {tokens[at][2] + 1}" if at < len(tokens) else "at the end")
            )
    return _each_once(pairs), at + 1


def _marks(tokens: list[tuple[str, str, int]], at: int, mark: str) -> bool:
    return at < len(tokens) and tokens[at][:2] == ("mark", mark)


def _word(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text)
    except ValueError:
        return text
