"""Encoders and projectors that llama.cpp has words for: one row each.

Source: the conversion classes of llama.cpp (conversion/*.py) and what tools/mtmd/clip.cpp reads. The names of
tensors come from the `gguf` package's own map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from auto_round.errors import Refusal, UnsupportedError
from auto_round.export.gguf.values import Value

Numbers = Callable[[Any, Mapping[str, Any]], dict[str, Value]]
"""Configuration of the whole model and of its image processor -> further keys."""


@dataclass(frozen=True, slots=True)
class Projector:
    """How an encoder of images and what is behind it are described to llama.cpp.

    Attributes:
        kind: `clip.projector_type`.
        encoder: `model_type` of the encoder's configuration that the row is about.
        renamed: pattern -> text, from names on disk to those that the map of the `gguf` package knows.
        left_out: patterns of tensors that llama.cpp does not read.
        wide: patterns of tensors that stay in 32 bits; vectors do anyway.
        half: patterns of tensors that are 16 bits wide in every file.
        plus_one: patterns of norms that multiply by one plus their weight.
        numbers: further keys.
    """

    kind: str
    encoder: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = ()
    wide: tuple[str, ...] = (r"\.embeddings\.",)
    half: tuple[str, ...] = ()
    plus_one: tuple[str, ...] = ()
    numbers: Numbers = lambda config, processor: {}


def _idefics(config: Any, processor: Mapping[str, Any]) -> dict[str, Value]:
    side = (processor.get("size") or {}).get("longest_edge", config.vision_config.image_size)
    return {
        "clip.vision.projector.scale_factor": Value("u32", int(config.scale_factor)),
        "clip.vision.preproc_image_size": Value("u32", int(side)),
    }


def _gemma(config: Any, processor: Mapping[str, Any]) -> dict[str, Value]:
    """Patches that one token stands for, on a side; llama.cpp takes 4 for granted."""
    del processor
    patches = config.vision_config.image_size // config.vision_config.patch_size
    side = patches // int(config.mm_tokens_per_image**0.5)
    return {} if side == _USUAL_SIDE else {"clip.vision.projector.scale_factor": Value("u32", side)}


_USUAL_SIDE = 4
_IDEFICS = Projector("idefics3", ("idefics3_vision", "smolvlm_vision"), numbers=_idefics)

PROJECTORS: Mapping[str, Projector] = MappingProxyType(
    {
        "idefics3": _IDEFICS,
        "smolvlm": _IDEFICS,
        "gemma3": Projector(
            "gemma3",
            ("siglip_vision_model",),
            renamed=(
                (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
                (r"^(?:model\.)?(multi_modal_projector\.mm_input_projection)_weight$", r"\1.weight"),
                (r"^model\.(multi_modal_projector\.)", r"\1"),
            ),
            left_out=(r"vision_model\.head\.",),
            half=(r"mm_input_projection",),
            plus_one=(r"mm_soft_emb_norm",),
            numbers=_gemma,
        ),
    }
)
"""By Transformers' `model_type` of the whole model."""


def projector_of(config: Any) -> Projector:
    """The row of `PROJECTORS` that a model's configuration asks for.

    Raises:
        UnsupportedError: no row for it, or for its encoder.
    """
    kind = str(config.model_type)
    encoder = str(getattr(getattr(config, "vision_config", None), "model_type", ""))
    found = PROJECTORS.get(kind)
    if found is not None and encoder in found.encoder:
        return found
    raise UnsupportedError(
        f'no mmproj file of model type "{kind}"' + (f' with an encoder "{encoder}"' if encoder else ""),
        [
            Refusal(
                "gguf",
                f"numbers and names of its encoder and projector are not in the table, which has "
                f"{', '.join(PROJECTORS)}",
                "make it with llama.cpp's convert_hf_to_gguf.py --mmproj, and leave out --mmproj here: the "
                "file of the language model fits beside it",
            )
        ],
    )
