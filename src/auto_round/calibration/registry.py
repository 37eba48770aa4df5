"""The data sets that have a name: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from auto_round.models.hub import Platform

PYTHON_DOCS: Final = "python-docs"
SELF: Final = "self"
"""Text that the model writes itself."""
DEFAULT_DATASET: Final = "NeelNanda/pile-10k"

TEXT_FIELDS: Final = ("text", "content", "code", "prompt", "sentence", "article")
"""Columns taken for the text of a data set that is not registered, first match."""
IMAGE_FIELDS: Final = ("images", "image")
"""Columns that hold paths of images."""


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Where a registered data set lies and which of its columns hold the text.

    Attributes:
        names: what it is called; the first is its name on the hub.
        splits: splits read when none is asked for.
        fields: columns that make one sample, joined by a newline; `("messages",)` is a conversation.
        limit: the first this many samples are used; None: all.
        streamed: read over the network sample by sample instead of downloading it whole.
        files: pattern of the Parquet files inside the repository, for one whose loading needs code otherwise.
        platform: hub that holds it.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...] = ("train",)
    fields: tuple[str, ...] = ("text",)
    limit: int | None = None
    streamed: bool = False
    files: str | None = None
    platform: Platform = "hf"


HUB_DATASETS: Final = (
    HubDataset(("NeelNanda/pile-10k", "pile-10k")),
    HubDataset(
        ("swift/pile-val-backup", "pile-val-backup"), ("validation",), limit=10_000, platform="model_scope"
    ),
    HubDataset(("BAAI/CCI3-HQ",), limit=10_000, streamed=True),
    HubDataset(
        ("codeparrot/github-code-clean",),
        ("train",),
        ("code",),
        10_000,
        streamed=True,
        files="data/*.parquet",
    ),
    HubDataset(("HuggingFaceH4/ultrachat_200k",), ("train_sft",), ("messages",)),
    HubDataset(("openbmb/Ultra-FineWeb",), ("en",), ("content",), 20_000, streamed=True),
    HubDataset(("madao33/new-title-chinese",), fields=("content",)),
    HubDataset(("google-research-datasets/mbpp", "mbpp"), ("train", "validation", "test"), ("text", "code")),
    HubDataset(("nvidia/OpenCodeInstruct",), fields=("input", "output"), limit=10_000, streamed=True),
)

LLAVA_REPOSITORY: Final = "liuhaotian/LLaVA-Instruct-150K"
LLAVA_FILES: Final = {
    "liuhaotian/llava": "conversation_58k.json",
    "llava_conv_58k": "conversation_58k.json",
    "llava_instruct_80k": "llava_instruct_80k.json",
    "llava_instruct_150k": "llava_instruct_150k.json",
}
"""Conversations about images of COCO (train2017), which lie elsewhere: name -> file of `LLAVA_REPOSITORY`."""

LATER_DATASETS: Final = ("coco2014", "audiocaps")
"""Names that mean captions for diffusion models or sound, which calibration cannot use yet."""


def llava_file(name: str) -> str | None:
    """File of one of LLaVA's data sets, with or without its owner's name; None for other names."""
    own = name.casefold()
    return LLAVA_FILES.get(own) or LLAVA_FILES.get(own.removeprefix("liuhaotian/"))


def built_in(name: str) -> str | None:
    """Which text that needs no hub and no file a name means, written in any case; None for other names."""
    own = name.casefold().replace("_", "-")
    return own if own in (PYTHON_DOCS, SELF) else None


def find_dataset(name: str) -> HubDataset | None:
    """Return the row of a name, written in any case; None when it is not registered."""
    for row in HUB_DATASETS:
        if name.casefold() in (known.casefold() for known in row.names):
            return row
    return None


def known_names() -> tuple[str, ...]:
    """Return every registered name, the built-in ones first."""
    return (PYTHON_DOCS, SELF, *(name for row in HUB_DATASETS for name in row.names))
