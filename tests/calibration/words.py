"""A tokenizer made in code: one token a word, with padding, end of text and a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} eot {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SPECIALS = ["<pad>", "<unk>", "eot", "user", "system", "assistant", ":"]


def make_tokenizer(count: int = 400, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    names = [*SPECIALS, "a", "b", "c", *(f"w{i}" for i in range(count))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    made.chat_template = template
    return made


def words(start: int, count: int) -> str:
    """Return `count` different words that begin with word number `start`."""
    return " ".join(f"w{(start + i) % 400}" for i in range(count))


class CountingTokenizer:
    """Counts the texts that it is given."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner
        self.texts = 0
        self.pad_token_id: int | None = inner.pad_token_id
        self.chat_template: Any = None

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        self.texts += len(text)
        found: Mapping[str, Any] = self.inner(text, **options)
        return found

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        raise AssertionError("no template here")
