"""A Transformers tokenizer as GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.gguf.pretokenizers import CHECK_TEXT, name_by_hash, name_by_rules
from auto_round.export.gguf.values import Value
from auto_round.log import logger

SPACE = "\u2581"
"""What SentencePiece writes for a blank."""


class TokenType(IntEnum):
    """Kinds of tokens. Source: `enum llama_token_type` of llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEY_OF = {
    "unk": "unknown",
    "sep": "seperator",  # spelled so in the format
    "pad": "padding",
}
_LOOKS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_FENCES = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def tokenizer_metadata(tokenizer: Any, config: Any) -> dict[str, Value]:
    """Metadata of a tokenizer: model, tokens, types, merges or scores, special tokens, chat template.

    Args:
        tokenizer: as `AutoTokenizer` loads it.
        config: the text model's configuration; its vocabulary size counts, and its special tokens where the
            tokenizer names none.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer of this kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} is not a tokenizer of the tokenizers library")
    rules: dict[str, Any] = json.loads(backend.to_str())
    size = int(config.vocab_size)
    _check_size(rules, size)
    kind = _kind(rules)
    tokens, types = _tokens(rules, size, kind)
    found = {"model": Value("str", kind), "pre": Value("str", _pre(kind, tokenizer, rules))}
    found["tokens"] = Value("str[]", tokens)
    if kind == "llama":
        found["scores"] = Value("f32[]", _scores(rules, tokens, types))
        if TokenType.BYTE not in types:  # llama.cpp looks bytes up without asking whether they are there
            logger.warning(
                "this vocabulary has no tokens for single bytes: llama.cpp ends the process when a prompt "
                "has a character that is not in the vocabulary, often a line break"
            )
    found["token_type"] = Value("i32[]", tuple(int(t) for t in types))
    if kind == "gpt2":
        found["merges"] = Value("str[]", _merges(rules))
    found |= _special(tokenizer, config, size)
    if kind == "llama":
        found["add_space_prefix"] = Value("bool", _adds_space(rules))
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return named | _chat_template(tokenizer)


def _refused(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "this tokenizer cannot be written as GGUF",
        [Refusal("gguf", reason, "pass a file made by llama.cpp's converter as --gguf_template")],
    )


def _check_size(rules: Mapping[str, Any], size: int) -> None:
    vocabulary = rules["model"].get("vocab")
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    largest = max([*numbers, *(token["id"] for token in rules["added_tokens"])], default=0)
    if largest >= size:
        raise _refused(f"it has a token {largest}, the model's vocabulary {size} tokens")


def _kind(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name of the algorithm: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE)."""
    model = rules["model"]["type"]
    if model != "BPE":
        raise _refused(f"its model is {model}, llama.cpp's language models have BPE")
    if "ByteLevel" in _types(rules.get("pre_tokenizer"), "pretokenizers"):
        return "gpt2"
    if _spaces_marked(rules):
        return "llama"
    raise _refused("its BPE works neither on bytes nor with SentencePiece's mark for blanks")


def _types(step: Mapping[str, Any] | None, inner: str) -> set[str]:
    return set() if step is None else {part["type"] for part in step.get(inner, [step])}


def _spaces_marked(rules: Mapping[str, Any]) -> bool:
    """Blanks become SentencePiece's mark, by the normalizer or by the pre-tokenizer."""
    if "Metaspace" in _types(rules.get("pre_tokenizer"), "pretokenizers"):
        return True
    normalizer = rules.get("normalizer") or {}
    return any(
        part["type"] == "Replace" and part["pattern"].get("String") == " " and part["content"] == SPACE
        for part in normalizer.get("normalizers", [normalizer])
        if "type" in part
    )


def _pre(kind: str, tokenizer: Any, rules: Mapping[str, Any]) -> str:
    if kind == "llama":
        return "default"
    name = name_by_hash(tokenizer.encode(CHECK_TEXT)) or name_by_rules(rules)
    if name is None:
        raise _refused(
            "llama.cpp does not know how it cuts text into words (neither its vocabulary nor its rules)"
        )
    return name


def _tokens(rules: Mapping[str, Any], size: int, kind: str) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Text and type of every number below `size`; numbers without a token are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    model = rules["model"]
    for text, number in model["vocab"].items():
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">") and model["byte_fallback"]
        tokens[number] = text
        types[number] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in rules["added_tokens"]:
        text = token["content"]
        control = token["special"] or _looks_special(text)
        tokens[token["id"]] = text if control else text.replace(SPACE, " ")
        types[token["id"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    unknown = model.get("unk_token")
    if kind == "llama" and unknown in tokens:
        types[tokens.index(unknown)] = TokenType.UNKNOWN
    return tuple(tokens), tuple(types)


def _looks_special(text: str) -> bool:
    """Tokens that some vocabularies forget to mark as special."""
    return text in _LOOKS_SPECIAL or any(text.startswith(a) and text.endswith(b) for a, b in _FENCES)


def _merges(rules: Mapping[str, Any]) -> tuple[str, ...]:
    """Pairs with a blank between them; blanks inside a part are written as bytes are."""
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in rules["model"]["merges"]]
    return tuple(" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs)


def _scores(rules: Mapping[str, Any], tokens: Sequence[str], types: Sequence[TokenType]) -> tuple[float, ...]:
    """Order in which SentencePiece joins: the earlier a merge, the higher the score of what it makes.

    Pieces that no merge makes come last; llama.cpp never asks for the scores of other tokens.
    """
    rank: dict[str, int] = {}
    for number, merge in enumerate(rules["model"]["merges"]):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault("".join(pair), number)
    last = float(len(rank))
    return tuple(
        0.0
        if kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
        else -float(rank[text])
        if text in rank
        else -last
        for text, kind in zip(tokens, types, strict=True)
    )


def _special(tokenizer: Any, config: Any, size: int) -> dict[str, Value]:
    found = {}
    for name in _SPECIAL:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, (list, tuple)):
            number = number[0] if number else None
        if isinstance(number, int) and 0 <= number < size:
            found[f"{_KEY_OF.get(name, name)}_token_id"] = Value("u32", number)
    ids = tokenizer("a").input_ids
    found["add_bos_token"] = Value("bool", bool(ids) and ids[0] == tokenizer.bos_token_id is not None)
    last = bool(ids) and len(ids) > 1 and tokenizer.eos_token_id is not None
    found["add_eos_token"] = Value("bool", last and ids[-1] == tokenizer.eos_token_id)
    return found


def _adds_space(rules: Mapping[str, Any]) -> bool:
    """Whether a blank is put before the text."""
    normalizer = rules.get("normalizer") or {}
    if "Prepend" in _types(normalizer or None, "normalizers"):
        return True
    step = rules.get("pre_tokenizer") or {}
    return any(
        part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never"
        for part in step.get("pretokenizers", [step])
        if "type" in part
    )


def _chat_template(tokenizer: Any) -> dict[str, Value]:
    """The default template, and the others by name."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": Value("str", template)}
    if not isinstance(template, dict) or not template:
        return {}
    found = {}
    others = sorted(name for name in template if name != "default")
    if "default" in template:
        found["tokenizer.chat_template"] = Value("str", template["default"])
    found |= {f"tokenizer.chat_template.{name}": Value("str", template[name]) for name in others}
    if others:
        found["tokenizer.chat_templates"] = Value("str[]", tuple(others))
    return found
