"""Exporter: names, dtypes and shapes of the output tensors, and the configuration beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from auto_round.checkpoint.writer import Shard
from auto_round.errors import Refusal
from auto_round.facts.layer import Block, Layer
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QuantizedLayer
from auto_round.schemes.plan import Plan

if TYPE_CHECKING:
    from auto_round.export.manifest import Manifest

Facts = Mapping[str, bool | int | float | str | None]
"""How a model was tuned, by option name, for example `{"iters": 200, "nsamples": 128}`."""


class Exporter(Protocol):
    """One output format. Stateless: every method is a pure function of its arguments."""

    @property
    def name(self) -> str:
        """Name on the command line, for example `auto_round`."""
        ...

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> Exporter:
        """The exporter to use for this plan: where a format has variants, the one that fits.

        `spec`, `encode` and `config` are asked of the result.
        """
        ...

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """Why this plan cannot be written in this format; asked before any tuning."""
        ...

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """Full tensor name -> dtype and shape of what `encode` will return for this layer."""
        ...

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """Full tensor name -> stored tensor of one quantized layer."""
        ...

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: Facts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config` of `config.json`; None when the folder is to look unquantized."""
        ...


@runtime_checkable
class Recasts(Protocol):
    """An exporter whose readers want another float dtype than the source's."""

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of the biases of quantized layers, and of the model in `config.json`."""
        ...


@runtime_checkable
class Keeps(Protocol):
    """An exporter whose readers cannot do with some layers packed, which are kept then."""

    def kept(self, layer: Layer) -> str:
        """Why a layer has to stay as it is; empty where it has not."""
        ...


@runtime_checkable
class Warns(Protocol):
    """An exporter that knows of readers that would not do well with a plan."""

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """What the user may want to change, one sentence each; asked before any tuning."""
        ...


@runtime_checkable
class OneFile(Protocol):
    """An exporter of one file of its own kind, which holds everything that a loader needs."""

    @property
    def file(self) -> str:
        """Name of the file inside the output folder."""
        ...

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The file as the shard writer wants it."""
        ...

    def read_part(self, folder: Path, name: str) -> bytes:
        """Bytes of a tensor of the manifest, as they lie in the file."""
        ...

    def histogram(self) -> Mapping[str, tuple[int, int, int]]:
        """Type name -> number of tensors, weights and bytes."""
        ...


@runtime_checkable
class StoresAll(Protocol):
    """An exporter that stores tensors outside of quantized layers its own way too."""

    def manifest(self, plan: Plan, layers: Sequence[Layer]) -> Manifest:
        """Every tensor of the output."""
        ...

    def encode_plain(self, source: str, value: Tensor) -> Mapping[str, Tensor]:
        """Stored tensors of one that is not quantized, given by its name and value in the source."""
        ...
