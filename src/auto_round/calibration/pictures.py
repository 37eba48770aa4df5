"""Rows with images: a sample's text and image files become what the model's processor makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.records import Conversation, Pictured
from auto_round.calibration.row import CalibrationRow
from auto_round.errors import ConfigError, MissingError
from auto_round.facts.model import TOKENS

INSTALL_IMAGES = 'pip install "auto-round[images]"'

MARK = "<image>"
"""Where an image belongs in a text, as the LLaVA data sets write it."""


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Makes rows of samples with images.

    Attributes:
        processor: gives the model's processor once it is needed; raises `ConfigError` where it has none.
        folder: where relative paths begin; None: beside the data set's file.
        template: chat template in place of the processor's own; None for that.
        token: token that stands for a piece of an image; -1 where it is not known.
    """

    processor: Callable[[], Any]
    folder: Path | None = None
    template: str | None = None
    token: int = -1

    def lacks_image(self, row: CalibrationRow) -> bool:
        """Whether a row speaks of an image that it does not hold: parts of a model see it differently."""
        return not row.beside_text and bool((row.tokens == self.token).any())

    def row(self, sample: Pictured, beside: Path | None) -> CalibrationRow:
        """What the model is called with for one sample, every key of the processor's.

        Args:
            sample: text and images.
            beside: folder of the data set's file.

        Raises:
            ConfigError: an image that is missing or broken, no processor, or one that refuses the sample.
        """
        images = [open_image(image, self.folder or beside, sample.where) for image in sample.images]
        processor = self.processor()
        talk = with_images(sample, images)
        try:
            made = self._processed(processor, talk, images)
        except Exception as error:
            raise ConfigError(
                f"{sample.where}: {type(processor).__name__} refuses the row "
                f"({type(error).__name__}: {str(error).strip()[:300]}); expected a conversation that its "
                f'template knows, with "{MARK}" where an image belongs'
            ) from error
        inputs = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        ids = inputs.get(TOKENS)
        if ids is None or ids.dim() != 2 or ids.shape[0] != 1:
            raise ConfigError(f"{sample.where}: {type(processor).__name__} gives no row of token ids for it")
        return CalibrationRow(inputs)

    def _processed(self, processor: Any, talk: list[dict[str, Any]], images: list[Any]) -> Mapping[str, Any]:
        if self.template or getattr(processor, "chat_template", None):
            chosen = {"chat_template": self.template} if self.template else {}
            made: Mapping[str, Any] = processor.apply_chat_template(
                talk, tokenize=True, return_dict=True, return_tensors="pt", **chosen
            )
            return made
        token = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", MARK))
        text = "\n".join(
            "".join(token if part["type"] == "image" else part["text"] for part in message["content"])
            for message in talk
        )
        result: Mapping[str, Any] = processor(text=[text], images=images or None, return_tensors="pt")
        return result


def with_images(sample: Pictured, images: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation in the form of Transformers' processors, images where `MARK` stands.

    Images that no mark speaks of come first in what the user says first.

    Raises:
        ConfigError: there are marks, but another number than images.
    """
    messages = (
        sample.talk.messages
        if isinstance(sample.talk, Conversation)
        else ({"role": "user", "content": sample.talk},)
    )
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks not in (0, len(images)):
        raise ConfigError(f'{sample.where}: {len(images)} images, but {marks} times "{MARK}" in the text')
    waiting = iter(images)
    unmarked = [] if marks else [{"type": "image", "image": image} for image in waiting]
    found: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        if message["role"] == "user":
            content, unmarked = unmarked, []
        for number, text in enumerate(message["content"].split(MARK)):
            if number:
                content.append({"type": "image", "image": next(waiting)})
            if text.strip() or not number:
                content.append({"type": "text", "text": text.strip() if marks else text})
        found.append({"role": message["role"], "content": content})
    if unmarked:
        raise ConfigError(f"{sample.where}: {len(images)} images, but no message of a user to put them in")
    return found


def open_image(image: object, folder: Path | None, where: str) -> Any:
    """An image in memory, in three colours.

    Args:
        image: a path, or an image of PIL.
        folder: where relative paths begin.
        where: name of the row for messages.

    Raises:
        ConfigError: it is missing, not readable or no image, or PIL is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            f"{where} holds images, which need a package that is missing: {INSTALL_IMAGES}"
        ) from error
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, (str, Path)):
        raise ConfigError(f"{where}: an image is of type {type(image).__name__}; expected a path")
    path = Path(image).expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    if not path.is_file():
        raise MissingError(
            f"{where}: no image {path}; relative paths begin at extra_data_dir, if it is given"
        )
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{where}: image {path} cannot be read: {error}") from error
