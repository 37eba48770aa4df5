"""Exporter: what an output of a format holds, what its readers refuse, and how it is read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from auto_round.checkpoint.reader import Checkpoint
from auto_round.checkpoint.writer import Shard
from auto_round.config.options import Options
from auto_round.errors import InternalError, Refusal
from auto_round.export.manifest import Manifest, make_manifest
from auto_round.export.planning import Planner
from auto_round.export.verification import WrittenRun
from auto_round.facts.attention import Attention
from auto_round.facts.layer import Block, Layer
from auto_round.facts.loading import Loading
from auto_round.facts.tensor import TensorSpec
from auto_round.numerics.activation_float import InputFormat
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.schemes.attention import AttentionPlan
from auto_round.schemes.plan import Plan

TuningFacts = Mapping[str, bool | int | float | str | None]
"""How a model was tuned, by option name, for example `{"iters": 200, "nsamples": 128}`."""

Inputs = Mapping[str, tuple[Tensor, int]]
"""Tensor of the source -> mean square of each input `[in]` float32, and the tokens behind it."""


@dataclass(frozen=True, slots=True)
class Rest:
    """A tensor of an output that belongs to no quantized layer and is no copy from the source.

    Attributes:
        values: what is stored, or the rows `[rows, in]` that are rounded first.
        format: numeric format that the rows are rounded to; None stores the values as they are.
    """

    values: Tensor
    format: Format | None = None


@dataclass(frozen=True, slots=True)
class Exporter(ABC):
    """One output format: a row of `export.table`. Stateless: a method is a function of its arguments.

    A format that is a folder of safetensors defines `spec`, `encode`, `config` and `refusals`; all else has a
    default. A format with a plan or a kind of file of its own overrides more.

    Attributes:
        name: name on the command line, for example `auto_round`.
        noun: what one output is, for people.
        library: package that loads the output and takes part in what is written.
        any_plan: it holds every plan, so it may be written in the run of a format that plans for itself.
        scales_in_model_dtype: its readers hold scales in the dtype of the model.
        holds_scales: it has a place for scales of the key/value cache and of attention.
        idle: options that do nothing for it -> the reason, as the end of "NAME has no effect: ".
    """

    name: str

    noun: ClassVar[str] = "a folder"
    library: ClassVar[str] = "transformers"
    any_plan: ClassVar[bool] = False
    scales_in_model_dtype: ClassVar[bool] = False
    holds_scales: ClassVar[bool] = False
    idle: ClassVar[Mapping[str, str]] = {}

    # What the user asked for.

    @classmethod
    def claims(cls, name: str) -> bool:
        """Whether a name of a format or of a scheme belongs to formats of this kind alone.

        They have plans of their own, so each is a run of its own.
        """
        return False

    @classmethod
    def settle(cls, options: Options, beside: Collection[str]) -> Options:
        """The options in line with formats of this kind; unchanged where they ask for none.

        Args:
            options: what the user asked for; formats that this kind does not know may be among them.
            beside: formats that may be written in the same run.

        Raises:
            ConfigError: options that contradict each other, or that belong to this kind and it is not asked
                for.
        """
        return options

    @property
    def presets(self) -> tuple[str, ...] | None:
        """Schemes that it is written with; None for every one that it holds."""
        return None

    def needs_tokenizer(self, options: Options) -> bool:
        """Whether the output holds the vocabulary, so that a tokenizer is needed."""
        return False

    def check(self, options: Options, output: Path, *, calibrated: bool) -> None:
        """Refuse what only this format can know to be wrong, before any work.

        Args:
            options: from `settle`.
            output: folder of the result.
            calibrated: calibration rows will run through the model.

        Raises:
            ConfigError: an option that cannot be carried out.
        """
        return

    # The plan.

    @property
    def planner(self) -> Planner | None:
        """Makes the plan of a run; None for a format that takes the plan made for all formats of a run."""
        return None

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> Exporter:
        """The exporter to use for this plan: where a format has variants, the one that fits.

        `refusals`, `unloadable`, `warnings` and `kept` may be asked before; all other methods below are asked
        of the result.
        """
        return self

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """Why this plan cannot be written in this format; asked before any tuning."""
        return []

    def warnings(self, plan: Plan, layers: Sequence[Layer]) -> list[str]:
        """What some readers cannot do with a plan that can be written, one sentence each, for people."""
        return []

    def unloadable(self, plan: Plan, layers: Sequence[Layer], loading: Loading) -> list[Refusal]:
        """Why Transformers would not load what is written for this plan, or not as it is meant."""
        return []

    def holds_activation(self, fmt: InputFormat) -> bool:
        """Whether a plan may round what flows into layers to this format.

        True where the output tells its readers to do so, or where it holds weights only and promises nothing.
        """
        return False

    def kept(self, layer: Layer) -> str:
        """Why this format's readers need a layer unquantized; empty where they do not."""
        return ""

    # What is written.

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype of the biases of quantized layers and of the model in `config.json`; None for its own."""
        return None

    @abstractmethod
    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """Full tensor name -> dtype and shape of what `encode` will return for this layer."""

    @abstractmethod
    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """Full tensor name -> stored tensor of one quantized layer."""

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config` of `config.json`; None when the folder is to look unquantized."""
        return None

    def manifest(self, plan: Plan, layers: Sequence[Layer], tensors: Mapping[str, TensorSpec]) -> Manifest:
        """Every tensor of the output: those of quantized layers, and the source's others as they are.

        Args:
            plan: what becomes of each layer.
            layers: the layers of the plan.
            tensors: everything in the source, by name, in the dtype in which it is kept.

        Raises:
            InternalError: two tensors of one name.
        """
        parts = {
            layer.name: self.spec(layer, fmt)
            for layer in layers
            if (fmt := plan.format_of(layer.name)) is not None
        }
        return make_manifest(parts, layers, tensors, bias_dtype=self.float_dtype)

    def with_scales(self, caches: AttentionPlan) -> Exporter:
        """This exporter, told which scales of attention it will be given.

        Raises:
            InternalError: it has no place for them, see `holds_scales`.
        """
        raise InternalError(f"{self.name} has no place for scales of attention")

    def encode_scales(self, attention: Attention, scales: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Full tensor name -> stored scales of one attention module.

        Args:
            attention: the module.
            scales: part (`q`, `k`, `v`) -> its steps, `[1]` or `[heads]`.
        """
        raise InternalError(f"{self.name} has no place for scales of attention")

    def encode_plain(self, source: str, value: Tensor) -> Mapping[str, Tensor]:
        """What is stored of a tensor that is not quantized, from its name and value in the source."""
        return {source: value}

    def rest(self, name: str, read: Callable[[str], Tensor]) -> Rest:
        """A tensor of the manifest that is neither encoded nor copied.

        Args:
            name: its name in the manifest.
            read: reads a tensor of the source by name.
        """
        raise InternalError(f"{self.name}: nothing says where {name} comes from")

    def encode_rest(self, q: QTensor) -> Tensor:
        """Stored form of a band of rows of a `Rest` that were rounded."""
        raise InternalError(f"{self.name} rounds no tensors outside of layers")

    @property
    def embedding(self) -> tuple[str, str] | None:
        """Names of the token embedding in the manifest and in the source, where this format rounds it.

        The model is then run with the rounded embedding. None where it is kept.
        """
        return None

    def decode_rest(self, name: str, stored: Tensor) -> Tensor:
        """Dequantized values of a stored tensor that `encode_rest` gave, float32 `[rows, in]`."""
        raise InternalError(f"{self.name} rounds no tensors outside of layers")

    def save_inputs(self, options: Options, inputs: Inputs, output: Path, folder: Path) -> None:
        """Write what flowed into the layers, where this format has a file for it and the user wants it.

        Args:
            options: from `settle`.
            inputs: what a run saw.
            output: folder of the result.
            folder: folder that will become it.
        """
        return

    # The files.

    def write_beside(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """Write what lies beside `file` and is made of the source alone.

        Args:
            folder: of the output.
            read: reads a tensor of the source by name.
        """
        return

    @property
    def file(self) -> str | None:
        """File that holds all a loader needs; None for a folder of safetensors with configurations beside."""
        return None

    def shards(self, manifest: Manifest) -> tuple[Shard, ...] | None:
        """Where each tensor of the manifest lies in files of another kind; None for shards of safetensors."""
        return None

    @property
    def command(self) -> str:
        """Shell command that runs the output, for the model card; empty where Transformers does."""
        return ""

    def histogram(self) -> Mapping[str, tuple[int, int, int]]:
        """Type name -> number of tensors, weights and bytes, where the file has types for all its tensors."""
        return {}

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[[str], Tensor]]:
        """A function that reads a tensor of the manifest back from disk, while the context lasts."""
        with Checkpoint.open(folder) as checkpoint:
            yield checkpoint.read

    @property
    def unchecked(self) -> str:
        """Why Transformers does not read what others do, for people; empty where it reads it."""
        return ""

    def verify(self, folder: Path, run: WrittenRun) -> dict[str, Any]:
        """Reload the output as its users would, and compare it with the tuned model; returns the figures.

        What Transformers does not read is not loaded.

        Raises:
            CheckpointError: it does not load, or is not what was tuned.
        """
        return {"skipped": self.unchecked} if self.unchecked else run.reload(folder, self)
