"""Tokenizers as GGUF metadata."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from auto_round.errors import UnsupportedError
from auto_round.export.gguf.pretokenizers import BY_HASH, CHECK_TEXT, name_by_hash, name_by_rules
from auto_round.export.gguf.tokenizer import TokenType, tokenizer_metadata
from auto_round.testing.tiny_models import tiny_tokenizer
from export.gguf.small_models import (
    MERGES,
    SPECIAL,
    VOCABULARY,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
)

CONFIG = SimpleNamespace(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=7)
KEY = "tokenizer.ggml."


def _rules(tokenizer: object) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def test_byte_level_tokens_types_and_merges() -> None:
    tokenizer = byte_level_tokenizer()
    found = tokenizer_metadata(tokenizer, CONFIG)
    tokens, types = found[KEY + "tokens"].value, found[KEY + "token_type"].value
    assert found[KEY + "model"].value == "gpt2"
    assert found[KEY + "pre"].value == "gpt-2"
    assert len(tokens) == len(types) == VOCABULARY
    for text, number in tokenizer.get_vocab().items():
        assert tokens[number] == text
    assert types[0] == types[1] == TokenType.CONTROL
    assert types[5] == TokenType.NORMAL
    assert types[-1] == TokenType.UNUSED
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert found[KEY + "merges"].value == tuple(f"{a} {b}" for a, b in MERGES)
    assert found[KEY + "bos_token_id"].value == tokenizer.bos_token_id
    assert found[KEY + "padding_token_id"].value == 7
    assert found[KEY + "add_bos_token"].value is False


def test_digits_apart_have_their_own_name() -> None:
    assert name_by_rules(_rules(byte_level_tokenizer(digits=True))) == "smollm"
    assert name_by_rules(_rules(byte_level_tokenizer())) == "gpt-2"


def test_unknown_rules_are_refused() -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_level_tokenizer()
    steps = [pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(UnsupportedError, match="gguf_template"):
        tokenizer_metadata(tokenizer, CONFIG)


def test_word_level_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="WordLevel"):
        tokenizer_metadata(tiny_tokenizer(), CONFIG)


def test_token_beyond_the_vocabulary_is_refused() -> None:
    small = SimpleNamespace(**{**vars(CONFIG), "vocab_size": 100})
    with pytest.raises(UnsupportedError, match="100 tokens"):
        tokenizer_metadata(byte_level_tokenizer(), small)


def test_hash_is_of_the_list_of_tokens() -> None:
    import hashlib

    digest = next(iter(BY_HASH))
    assert name_by_hash([1, 2, 3]) is None
    assert len(digest) == len(hashlib.sha256(b"").hexdigest())
    # From convert_hf_to_gguf_update.py: changing a letter would lose every known vocabulary.
    assert hashlib.sha256(CHECK_TEXT.encode()).hexdigest() == (
        "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    )


def test_sentencepiece_scores_follow_the_merges() -> None:
    tokenizer = sentencepiece_tokenizer()
    found = tokenizer_metadata(tokenizer, CONFIG)
    tokens, scores = found[KEY + "tokens"].value, found[KEY + "scores"].value
    types = found[KEY + "token_type"].value
    assert found[KEY + "model"].value == "llama"
    assert found[KEY + "add_space_prefix"].value is True
    assert found[KEY + "add_bos_token"].value is True
    assert types[tokens.index("<unk>")] == TokenType.UNKNOWN
    assert types[tokens.index("<s>")] == TokenType.CONTROL
    assert types[tokens.index("<0x0A>")] == TokenType.BYTE
    made = ["an", "\u2581the", "he", "\u2581t"]
    assert sorted(made, key=lambda t: -scores[tokens.index(t)]) == ["\u2581t", "he", "\u2581the", "an"]
    assert max(scores[tokens.index(t)] for t in "abc") < min(scores[tokens.index(t)] for t in made)


def test_a_vocabulary_without_bytes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp looks `<0x0A>` up in it, and ends the process when it is not there."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokenizer_metadata(sentencepiece_tokenizer(), CONFIG)
    assert not caplog.records
    vocabulary = {text: i for i, text in enumerate(["<unk>", "\u2581", "a", "b"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True)])
    tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), CONFIG)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "line break" in caplog.text


@pytest.mark.parametrize("text", ["the tan", "a hint", "then", "th the  an", "e\nq"])
def test_joining_by_score_gives_the_same_tokens(text: str) -> None:
    """SentencePiece's algorithm, as llama.cpp runs it, on our scores."""
    tokenizer = sentencepiece_tokenizer()
    found = tokenizer_metadata(tokenizer, CONFIG)
    scores = dict(zip(found[KEY + "tokens"].value, found[KEY + "scores"].value, strict=True))
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    numbers = []
    for piece in pieces:
        known = tokenizer.get_vocab().get(piece)
        octets = [tokenizer.get_vocab()[f"<0x{b:02X}>"] for b in piece.encode()]
        numbers += octets if known is None else [known]
    assert numbers == tokenizer(text, add_special_tokens=False).input_ids


def test_chat_template_is_taken_over() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_metadata(tokenizer, CONFIG)["tokenizer.chat_template"].value == "{{ messages }}"
    assert SPECIAL[0] in tokenizer_metadata(tokenizer, CONFIG)[KEY + "tokens"].value
