"""Turns samples into the text that a chat model would see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from auto_round.calibration.records import Conversation, Message
from auto_round.errors import ConfigError

NO_TEMPLATE = (
    "apply_chat_template or system_prompt: this tokenizer has no chat template; remove these words behind "
    "the data set's name, or name a tokenizer that has one (--tokenizer)"
)
"""What is said where a template is asked for and there is none."""


class Tokenizer(Protocol):
    """What calibration asks of a Transformers tokenizer."""

    pad_token_id: int | None
    chat_template: Any

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Tokenize a batch of texts."""
        ...

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any:
        """Render a conversation."""
        ...


def render_chat(
    sample: str | Conversation, tokenizer: Tokenizer, use_template: bool | None, system_prompt: str | None
) -> tuple[str, bool]:
    """Return the text of a sample, and whether the template already put the special tokens in.

    Args:
        sample: text counts as what the user says.
        tokenizer: owner of the chat template.
        use_template: None: for conversations, when there is a template; without one they are joined
            by newlines.
        system_prompt: message put first in place of the sample's own system message; None: none.

    Raises:
        ConfigError: a template was asked for and the tokenizer has none, or it refuses the conversation.
    """
    has_template = bool(tokenizer.chat_template)
    if use_template is None:
        use_template = isinstance(sample, Conversation) and has_template
    if not use_template:
        if isinstance(sample, str):
            return sample, False
        return "\n".join(message["content"] for message in sample.messages), False
    if not has_template:
        raise ConfigError(NO_TEMPLATE)
    messages = sample.messages if isinstance(sample, Conversation) else ({"role": "user", "content": sample},)
    return fill(tokenizer, with_system(messages, system_prompt)), True


def with_system(messages: Sequence[Message], prompt: str | None) -> list[Message]:
    """Messages behind another system message; as they are where there is none."""
    if prompt is None:
        return list(messages)
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": prompt}, *rest]


def fill(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Text of a conversation, which ends where the assistant speaks if the user spoke last.

    Raises:
        ConfigError: the tokenizer's template refuses it.
    """
    from jinja2.exceptions import TemplateError

    asks = messages[-1]["role"] == "user"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except TemplateError as error:
        roles = " > ".join(message["role"] for message in messages)
        raise ConfigError(
            f"apply_chat_template: the tokenizer's template refuses a conversation {roles}: {error}; "
            "remove system_prompt or apply_chat_template"
        ) from error
