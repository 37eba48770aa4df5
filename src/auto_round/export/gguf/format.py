"""The formats `gguf:q4_k_m` and so on: one file for llama.cpp, with a mixture of types for its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from auto_round.checkpoint.writer import Shard
from auto_round.config.options import Options
from auto_round.errors import InternalError, Refusal
from auto_round.export.exporter import Exporter, Inputs, Rest
from auto_round.export.gguf.file import GgufFile, pack_rows
from auto_round.export.gguf.imatrix import read_imatrix
from auto_round.export.gguf.mmproj import Mmproj, describe_mmproj
from auto_round.export.gguf.model import describe_gguf, model_name
from auto_round.export.gguf.plan import plan_gguf
from auto_round.export.gguf.request import settle_gguf
from auto_round.export.gguf.save_imatrix import check_save_imatrix, save_imatrix
from auto_round.export.gguf.template import from_template, with_name
from auto_round.export.gguf.tensors import Change
from auto_round.export.gguf.verify import verify_gguf
from auto_round.export.manifest import Manifest
from auto_round.export.planning import Planned, Planner
from auto_round.export.verification import WrittenRun
from auto_round.facts.layer import Layer
from auto_round.facts.tensor import TensorSpec
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.models.source import ModelSource
from auto_round.numerics.format import Format
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.schemes.gguf_types import EMBEDDING, FILE_TYPES, FORMAT_PREFIX, TYPES, FileType, file_type
from auto_round.schemes.plan import Plan
from auto_round.schemes.request import plan_request
from auto_round.tuning.settings import tune_settings


@dataclass(frozen=True, slots=True)
class GgufFormat(Exporter):
    """A GGUF file of one type.

    Attributes:
        made: the file with the types of all its tensors; None until it is planned.
        mmproj: the file of the encoder and projector beside it, where it is wanted.
    """

    made: GgufFile | None = None
    mmproj: Mmproj | None = None

    noun: ClassVar[str] = "a GGUF file"
    library: ClassVar[str] = "gguf"
    idle: ClassVar[Mapping[str, str]] = {
        "max_shard_size": "a GGUF model is one file",
        "quant_lm_head": "the GGUF type gives the output head its own type",
        "quant_nontext_module": "the file holds the language model",
    }

    @property
    def kind(self) -> FileType:
        """The mixture."""
        return file_type(self.name)

    @classmethod
    def claims(cls, name: str) -> bool:
        """Names such as `gguf:q4_k_m` and `GGUF:Q4_K_M`."""
        return name.strip().casefold().startswith(FORMAT_PREFIX)

    @classmethod
    def settle(cls, options: Options, beside: Collection[str]) -> Options:
        """Scheme and layer rules in GGUF's words, see `request.settle_gguf`."""
        return settle_gguf(options, beside)

    @property
    def presets(self) -> tuple[str, ...]:
        """The one scheme of the type."""
        return (self.kind.preset if TYPES[self.kind.base].preset is not None else "BF16",)

    def needs_tokenizer(self, options: Options) -> bool:
        """The file holds the vocabulary, unless a template gives it."""
        return options.output.gguf_template is None

    def check(self, options: Options, output: Path, *, calibrated: bool) -> None:
        """Refuse a file of importances that cannot be written, see `save_imatrix`."""
        check_save_imatrix(options, output, calibrated=calibrated)

    @property
    def planner(self) -> Planner:
        """The mixture decides on the type of each tensor."""
        return self._plan

    def _plan(
        self, source: ModelSource, tokenizer: Any, options: Options, asked: Sequence[Exporter]
    ) -> Planned:
        """See `Planner`.

        Raises:
            UnsupportedError: llama.cpp has no words for the model or its tokenizer.
            ConfigError: a rule that cannot hold in a GGUF file, or the `gguf` package is missing.
            CheckpointError: a template or importances of another model.
        """
        name = model_name(source.folder, options.model.model, source.config)
        template = options.output.gguf_template
        if template is None:
            model = describe_gguf(source, tokenizer, name)
        else:
            model = with_name(from_template(Path(template), source), name)
        steered = tune_settings(options.tune, TYPES[self.kind.base].bits).needs_rows
        wanted = plan_request(options.scheme, chosen=options.chosen_layers)
        plan, types = plan_gguf(source, model, self.kind, wanted, imatrix=steered)
        file = GgufFile(types.kind, f"{name}-{types.word}.gguf", model, types.of)
        kind = options.output.mmproj
        beside = None if kind is None else describe_mmproj(source, kind, name)
        exporters: dict[str, Exporter] = {self.name: replace(self, made=file, mmproj=beside)}
        exporters |= {e.name: e.for_plan(plan, source.layers) for e in asked if e.name != self.name}
        path = options.calibration.imatrix
        importance = {} if path is None else read_imatrix(Path(path)).for_sources(model)
        return Planned(plan, exporters, importance, (*plan.warnings, *_of_dtype(options)))

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        """Layers whose planned format is not the type of their tensor: none, when the plan is this file's."""
        return [
            Refusal(self.name, f"{layer.name} is planned as {fmt.name}, its tensor is {part.type.name}")
            for layer in layers
            if (fmt := plan.format_of(layer.name)) is not None
            for part in self._file.parts_of(layer.alone).values()
            if fmt != GGUF_FORMATS.get(part.type.name) and part.tensor.change is not Change.SCALE
        ]

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        """Part name -> bytes of its rows."""
        return {name: part.spec for name, part in self._file.parts_of(layer.alone).items()}

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        """The parts of `spec`; none for a head that the file stores as the embedding, under another name."""
        return self._file.encode(layer.name, layer.alone, q.weight)

    def manifest(self, plan: Plan, layers: Sequence[Layer], tensors: Mapping[str, TensorSpec]) -> Manifest:
        """Parts of the file; nothing is copied byte for byte."""
        encoded = {
            layer.name: tuple(self._file.parts_of(layer.alone))
            for layer in layers
            if plan.scheme_of(layer.name) is not None
        }
        return Manifest({name: part.spec for name, part in self._file.parts.items()}, (), encoded)

    def encode_plain(self, source: str, value: Tensor) -> Mapping[str, Tensor]:
        """Parts of a tensor that is stored as plain numbers: norms, biases, kept layers."""
        return self._file.encode_plain(source, value)

    def rest(self, name: str, read: Callable[[str], Tensor]) -> Rest:
        """A tensor of the file that holds none of the layers to quantize: embedding, norm, bias, constant."""
        part = self._file.parts[name]
        rows, fmt = self._file.rows_of(part, read), GGUF_FORMATS.get(part.type.name)
        return Rest(rows, fmt) if fmt else Rest(rows.reshape(part.spec.shape).to(part.spec.dtype))

    def encode_rest(self, q: QTensor) -> Tensor:
        """Bytes of rounded rows, as the file has them."""
        return pack_rows(q)

    @property
    def embedding(self) -> tuple[str, str] | None:
        """The token embedding, where its type rounds it and its rows keep their order."""
        part = self._file.parts.get(EMBEDDING)
        if part is None or part.type.name not in GGUF_FORMATS or part.piece is None:
            return None
        return (EMBEDDING, part.piece.source) if part.piece.order is None else None

    def decode_rest(self, name: str, stored: Tensor) -> Tensor:
        """Weights of a rounded tensor, from its bytes."""
        part = self._file.parts[name]
        fmt = GGUF_FORMATS[part.type.name]
        octets = stored.reshape(part.spec.shape)
        return fmt.dequantize(GGUF_BLOCKS[part.type.name].unpack({"weight": octets}, fmt, part.tensor.shape))

    def save_inputs(self, options: Options, inputs: Inputs, output: Path, folder: Path) -> None:
        """Write the importances where the user wants them, in llama.cpp's format."""
        save_imatrix(options, self._file.model, inputs, output, folder)

    @property
    def file(self) -> str:
        """Name of the file."""
        return self._file.name

    def shards(self, manifest: Manifest) -> tuple[Shard, ...]:
        """The file with the place of each part."""
        return (self._file.shard,)

    @property
    def command(self) -> str:
        """llama.cpp's own program."""
        return f"llama-cli -m {self.file}"

    def histogram(self) -> Mapping[str, tuple[int, int, int]]:
        """Type name -> number of tensors, weights and bytes."""
        return self._file.histogram()

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[[str], Tensor]]:
        """Parts by name, as bytes."""
        yield partial(self._file.read_part, folder)

    def verify(self, folder: Path, run: WrittenRun) -> dict[str, Any]:
        """Read the file with the `gguf` package, and with llama.cpp where it is installed."""
        found = verify_gguf(self._file, folder, run)
        return found if self.mmproj is None else found | self.mmproj.check(folder, run.source.read_tensor)

    def write_beside(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """The encoder and projector, where they are wanted."""
        if self.mmproj is not None:
            self.mmproj.write(folder, read)

    @property
    def _file(self) -> GgufFile:
        if self.made is None:
            raise InternalError(f"{self.name} is not planned yet")
        return self.made


def _of_dtype(options: Options) -> list[str]:
    """Says what `model_dtype` is here, where it is given."""
    wanted = options.model.model_dtype
    if wanted in (None, "auto"):
        return []
    return [f"weights are rounded from {wanted}; tensors that are not rounded keep the dtypes of a GGUF file"]


EVERY_TYPE = tuple(GgufFormat(FORMAT_PREFIX + name) for name in FILE_TYPES)
"""One format for each type of file."""
