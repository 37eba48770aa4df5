"""What a GGUF file holds besides quantized layers: embeddings, norms, biases, constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from auto_round.checkpoint.writer import ShardWriter
from auto_round.errors import InternalError, NumericsError
from auto_round.export.gguf.exporter import GgufExporter, Part, pack_rows
from auto_round.layouts.gguf import GGUF_BLOCKS
from auto_round.numerics.format import Format
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.numerics.search import Effort
from auto_round.pipeline.workers import workers
from auto_round.tuning.weights import round_to_nearest

EMBEDDING = "token_embd.weight"
"""Name of the token embedding in every architecture. Source: `TENSOR_NAMES` of the `gguf` package."""

BAND = 1 << 24
"""Weights rounded at a time: an embedding of a hundred thousand rows is never held in float32."""


@dataclass(frozen=True, slots=True)
class Rest:
    """How to make the parts that no layer gives.

    Attributes:
        exporter: of the file.
        read: tensor of the source by name.
        effort: search of the range; None to round plainly.
        device: where to round.
    """

    exporter: GgufExporter
    read: Callable[[str], Tensor]
    effort: Effort | None
    device: torch.device

    def write(self, writer: ShardWriter) -> None:
        """Write everything that is missing.

        Raises:
            NumericsError: a weight is not finite; names the tensor.
        """
        for name in writer.missing:
            writer.put(name, self._make(self.exporter.parts[name]))

    def write_embedding(self, writer: ShardWriter) -> tuple[str, Tensor, dict[str, Tensor]] | None:
        """Write the token embedding unless an earlier run did; None when it is not rounded.

        Returns:
            Its name in the source, its weights after rounding, `[vocabulary, width]` float32, and what was
            written by part.

        Raises:
            NumericsError: a weight is not finite.
        """
        part = self.exporter.parts.get(EMBEDDING)
        fmt = None if part is None else GGUF_FORMATS.get(part.type.name)
        if part is None or fmt is None or part.piece is None or part.piece.order is not None:
            return None
        written = {}
        if EMBEDDING in writer.missing:
            octets = self._make(part)
            writer.put(EMBEDDING, octets)
            written[EMBEDDING] = octets
        else:
            data = bytearray(self.exporter.read_part(writer.folder, EMBEDDING))
            octets = torch.frombuffer(data, dtype=torch.uint8).reshape(part.spec.shape)
        q = GGUF_BLOCKS[fmt.name].unpack({"weight": octets}, fmt, part.tensor.shape)
        return part.piece.source, fmt.dequantize(q), written

    def _make(self, part: Part) -> Tensor:
        rows = self._rows(part)
        fmt = GGUF_FORMATS.get(part.type.name)
        if fmt is None:
            return rows.reshape(part.spec.shape).to(part.spec.dtype)
        try:
            bands = torch.split(rows, max(1, BAND // rows.shape[-1]))
            with workers(self.device) as pool:
                octets = list(pool.map(partial(self._round, fmt), bands))
        except NumericsError as error:
            raise NumericsError(f"{part.tensor.name}: {error}") from error
        return torch.cat(octets)

    def _round(self, fmt: Format, band: Tensor) -> Tensor:
        """Bytes of a band of rows."""
        return pack_rows(round_to_nearest(band.to(self.device), fmt, None, self.effort)).cpu()

    def _rows(self, part: Part) -> Tensor:
        if part.piece is not None:
            return part.tensor.prepare(part.piece, self.read(part.piece.source))
        if part.tensor.values:
            return torch.tensor(part.tensor.values, dtype=torch.float32, device="cpu")
        if part.tensor.name not in self.exporter.model.given:
            raise InternalError(f"{part.tensor.name} has no source")
        given = self.exporter.model.given[part.tensor.name]
        return given.reshape(-1, given.shape[-1])
