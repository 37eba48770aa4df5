"""What one record of a data set is: text, a conversation, or tokens that are ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from auto_round.calibration.registry import IMAGE_FIELDS, TEXT_FIELDS
from auto_round.calibration.row import CalibrationRow
from auto_round.errors import ConfigError
from auto_round.facts.model import MASK, TOKENS

Message = Mapping[str, str]
_CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
_SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with the keys `role` and `content`, in order."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token ids.

    Attributes:
        ids: `[tokens] int64`.
        mask: `[tokens] bool`, False for padding; None: every token counts.
        ready: came as ids from the user, so that padding may hide in them.
    """

    ids: Tensor
    mask: Tensor | None = None
    ready: bool = False


@dataclass(frozen=True, slots=True)
class Pictured:
    """Text with images.

    Attributes:
        talk: what is said; an image belongs where "<image>" stands, else first.
        images: paths, or images of PIL.
        where: name of the record for messages.
    """

    talk: str | Conversation
    images: tuple[object, ...]
    where: str


Sample = str | Conversation | Tokens | Pictured | CalibrationRow


def samples_of(record: object, fields: Sequence[str], where: str) -> Iterator[Sample]:
    """Yield the samples of a record: one, or one a row where the record is a batch.

    Args:
        record: text; ids as numbers, `[tokens]` or `[batch, tokens]`; a mapping that holds one of these; or a
            list of such records.
        fields: columns of the text, joined by a newline; empty: found by their usual names.
        where: name of the record for messages.

    Raises:
        ConfigError: the record is none of these.
    """
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        yield from _of_mapping(record, fields, where)
    elif isinstance(record, (Tensor, np.ndarray)):
        yield from _of_ids(record, None, where)
    elif isinstance(record, (list, tuple)):
        yield from _of_list(record, fields, where)
    else:
        raise ConfigError(
            f"{where} is of type {type(record).__name__}; expected text, token ids, or a mapping that holds "
            "text or input_ids"
        )


def _of_list(record: Sequence[object], fields: Sequence[str], where: str) -> Iterator[Sample]:
    if all(isinstance(entry, int) for entry in record):
        yield from _of_ids(record, None, where)
    elif all(isinstance(entry, Mapping) and {"role", "content"} <= entry.keys() for entry in record):
        yield _conversation(record, where)
    else:
        for entry in record:
            yield from samples_of(entry, fields, where)


def _of_mapping(record: Mapping[str, object], fields: Sequence[str], where: str) -> Iterator[Sample]:
    if "input_ids" in record and any(_is_float(v) for k, v in record.items() if k not in (TOKENS, MASK)):
        yield _ready_row(record, where)
        return
    if "input_ids" in record:
        yield from _of_ids(record["input_ids"], record.get("attention_mask"), where)
        return
    if fields and (missing := [name for name in fields if name not in record]):
        raise ConfigError(f"{where} has no field {missing}; it has {sorted(record)}")
    talk = next((name for name in fields or _CONVERSATION_FIELDS if _is_conversation(record.get(name))), None)
    chosen = fields or [name for name in TEXT_FIELDS if isinstance(record.get(name), str)][:1]
    images = _images_of(record)
    if talk is not None:
        yield _with_images(_conversation(record[talk], where), images, where)
    elif chosen:
        text = "\n".join(_text(record[name], f'field "{name}" of {where}') for name in chosen)
        yield _with_images(text, images, where)
    elif len(record) == 1:
        ((name, value),) = record.items()
        yield from samples_of("" if value is None else value, (), f'field "{name}" of {where}')
    else:
        raise ConfigError(
            f"{where} has the fields {sorted(record)}; expected one of "
            f"{[*TEXT_FIELDS, _CONVERSATION_FIELDS[0], 'input_ids']}, or a single field"
        )


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _ready_row(record: Mapping[str, object], where: str) -> CalibrationRow:
    """What a processor made of text and images, one row of it.

    Raises:
        ConfigError: several rows, or values that are no tensors.
    """
    inputs = {name: value for name, value in record.items() if isinstance(value, Tensor)}
    ids = inputs.get(TOKENS)
    if ids is None or ids.dim() != 2 or ids.shape[0] != 1 or len(inputs) < len(record):
        raise ConfigError(
            f"{where} holds images beside token ids; expected tensors as a processor gives them for one row, "
            "input_ids [1, tokens] among them"
        )
    return CalibrationRow({name: value.detach().cpu() for name, value in inputs.items()})


def _images_of(record: Mapping[str, object]) -> tuple[object, ...]:
    value = next((record[name] for name in IMAGE_FIELDS if record.get(name)), ())
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _with_images(talk: str | Conversation, images: tuple[object, ...], where: str) -> Sample:
    return Pictured(talk, images, where) if images else talk


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where} is of type {type(value).__name__}, expected text")
    return value


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(entry, Mapping) for entry in value)
    )


def _conversation(value: object, where: str) -> Conversation:
    messages = []
    for entry in value if isinstance(value, (list, tuple)) else ():
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if isinstance(content, (list, tuple)):
            content = _joined_parts(content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ConfigError(
                f"a message of {where} has the fields {sorted(entry)}; expected role and content, both text"
            )
        messages.append({"role": _SPEAKERS.get(role, role), "content": content})
    return Conversation(tuple(messages))


def _joined_parts(parts: Sequence[object]) -> str | None:
    """Content that comes in parts as one text; None where it is not made of texts and images."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            return None
        texts.append("<image>" if part["type"] == "image" else str(part.get("text", "")))
    return "".join(texts)


def _of_ids(value: object, mask: object, where: str) -> Iterator[Tokens]:
    ids = _rows(value, where, "token ids")
    if ids.is_floating_point() or ids.is_complex():
        raise ConfigError(f"{where}: the token ids are {ids.dtype}; expected whole numbers")
    masks = None if mask is None else _rows(mask, where, "attention mask") != 0
    if masks is not None and masks.shape != ids.shape:
        raise ConfigError(
            f"{where}: the attention mask has shape {tuple(masks.shape)}, the token ids {tuple(ids.shape)}"
        )
    if ids.numel() and int(ids.min()) < 0:
        raise ConfigError(f"{where} holds the token id {int(ids.min())}; ids are never negative")
    for index, row in enumerate(ids.to(torch.int64)):
        yield Tokens(row, None if masks is None else masks[index], ready=True)


def _rows(value: object, where: str, what: str) -> Tensor:
    try:
        found = torch.as_tensor(value, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: the {what} are not a rectangle of numbers: {error}") from error
    if found.numel() == 0:
        return torch.zeros(1, 0, dtype=torch.int64, device="cpu")
    if found.dim() not in (1, 2):
        raise ConfigError(
            f"{where}: the {what} have shape {tuple(found.shape)}; expected [tokens] or [batch, tokens]"
        )
    return found.reshape(-1, found.shape[-1])
