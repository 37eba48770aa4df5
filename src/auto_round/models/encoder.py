"""A text encoder of a diffusers pipeline: a model of Transformers, called as its pipeline calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_round.checkpoint.header import read_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import Refusal, UnsupportedError
from auto_round.facts.model import TOKENS
from auto_round.models.folder import FolderSource, read_parts
from auto_round.models.recorder import Recorder
from auto_round.models.replayed_source import ReplayedSource
from auto_round.models.skeleton import build_kind, read_model_config
from auto_round.models.trace import StubStem
from auto_round.stored.unpacked import open_plain


class EncoderSource(FolderSource, ReplayedSource):
    """A `ModelSource` over the folder of a text encoder, of the class that its pipeline names."""

    @classmethod
    def of_kind(cls, folder: Path, kind: Any) -> EncoderSource:
        """Read the configuration and the headers of the weight files.

        Args:
            folder: folder of the encoder, with `config.json` and safetensors files.
            kind: its class, of Transformers.

        Raises:
            UnsupportedError: it reads no text, or has no list of blocks.
            CheckpointError: weights are missing, damaged, or of another model than the configuration.
        """
        refuse_textless(kind)
        checkpoint = Checkpoint.open(folder)
        try:
            config = read_model_config(folder)
            for part in (config, config.get_text_config()):
                part.use_cache = False  # nobody reads on; blocks that run again would find what they left
            files = open_plain(checkpoint, read_object(folder / "config.json"))
            return cls(files, read_parts(files, config, lambda dtype: build_kind(kind, config, dtype)))
        except BaseException:
            checkpoint.close()
            raise

    @property
    def class_name(self) -> str:
        """Name of the encoder's class."""
        return self.model_class

    @property
    def _left_out(self) -> list[str]:
        return self._outside_stem(None, towers=False)

    def _settle(self, real: Any, recorders: Sequence[Recorder]) -> None:
        StubStem(real, self._stem_parts(real), recorders, None)


def refuse_textless(kind: Any) -> None:
    """Refuse a class that does not read tokens.

    Raises:
        UnsupportedError: with what is expected.
    """
    if getattr(kind, "main_input_name", None) != TOKENS or not hasattr(kind, "_from_config"):
        raise UnsupportedError(
            f"{kind.__name__} is no text encoder",
            [Refusal("models", "it reads no tokens", "leave it out of --components: it is copied as it is")],
        )
