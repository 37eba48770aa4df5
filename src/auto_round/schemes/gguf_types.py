"""Types of tensors in a GGUF file, and the file types that name mixtures of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from auto_round.errors import ConfigError, nearest
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme

EMBEDDING = "token_embd.weight"
"""Name of the token embedding in every architecture. Source: `TENSOR_NAMES` of the `gguf` package."""


@dataclass(frozen=True, slots=True)
class GgufType:
    """How the numbers of one tensor are stored.

    Attributes:
        name: for example `q4_k`.
        number: id in the file. Source: `enum ggml_type` of ggml.h.
        block: weights in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block. Source: the block structures of ggml-common.h.
        preset: scheme preset with the same numbers; None for 16 and 32 bits.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    preset: str | None = None

    @property
    def scheme(self) -> QuantizationScheme | None:
        """Scheme of layers of this type; None keeps them."""
        return None if self.preset is None else PRESET_SCHEMES[self.preset]

    @property
    def bits(self) -> int:
        """Bits of a code, scales not counted."""
        return 8 * self.block_bytes // self.block if self.scheme is None else self.scheme.bits

    def fits(self, n_in: int) -> bool:
        """Whether a row of `n_in` weights is a whole number of blocks."""
        return n_in % self.block == 0

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of `n_in` weights, which `fits`."""
        return n_in // self.block * self.block_bytes

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of `shape` `[..., in]`."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


TYPES: Mapping[str, GgufType] = MappingProxyType(
    {
        t.name: t
        for t in (
            GgufType("f32", 0, 1, 4),
            GgufType("f16", 1, 1, 2),
            GgufType("bf16", 30, 1, 2),
            GgufType("q4_0", 2, 32, 18, "GGUF:Q4_0"),
            GgufType("q4_1", 3, 32, 20, "GGUF:Q4_1"),
            GgufType("q5_0", 6, 32, 22, "GGUF:Q5_0"),
            GgufType("q5_1", 7, 32, 24, "GGUF:Q5_1"),
            GgufType("q8_0", 8, 32, 34, "GGUF:Q8_0"),
            GgufType("q2_k", 10, 256, 84, "GGUF:Q2_K_S"),
            GgufType("q3_k", 11, 256, 110, "GGUF:Q3_K_S"),
            GgufType("q4_k", 12, 256, 144, "GGUF:Q4_K_S"),
            GgufType("q5_k", 13, 256, 176, "GGUF:Q5_K_S"),
            GgufType("q6_k", 14, 256, 210, "GGUF:Q6_K"),
            GgufType("mxfp4", 39, 32, 17, "GGUF:MXFP4"),
            GgufType("nvfp4", 40, 64, 36, "GGUF:NVFP4"),
        )
    }
)
"""Types of tensors by name."""


@dataclass(frozen=True, slots=True)
class FileType:
    """What a user asks for: a base type and rules for the tensors that differ from it.

    Attributes:
        name: for example `q4_k_m`; `GGUF:` before it in capitals is the scheme.
        number: `general.file_type`. Source: `enum llama_ftype` of llama.h.
        base: type of all tensors that no rule names.
    """

    name: str
    number: int
    base: str

    @property
    def preset(self) -> str:
        """Name of the scheme preset."""
        return f"GGUF:{self.name.upper()}"


FILE_TYPES: Mapping[str, FileType] = MappingProxyType(
    {
        t.name: t
        for t in (
            FileType("f16", 1, "f16"),
            FileType("bf16", 32, "bf16"),
            FileType("q4_0", 2, "q4_0"),
            FileType("q4_1", 3, "q4_1"),
            FileType("q5_0", 8, "q5_0"),
            FileType("q5_1", 9, "q5_1"),
            FileType("q8_0", 7, "q8_0"),
            FileType("q2_k", 10, "q2_k"),
            FileType("q2_k_s", 21, "q2_k"),
            FileType("q2_k_mixed", 21, "q2_k"),
            FileType("q3_k_s", 11, "q3_k"),
            FileType("q3_k_m", 12, "q3_k"),
            FileType("q3_k_l", 13, "q3_k"),
            FileType("q4_k_s", 14, "q4_k"),
            FileType("q4_k_m", 15, "q4_k"),
            FileType("q5_k_s", 16, "q5_k"),
            FileType("q5_k_m", 17, "q5_k"),
            FileType("q6_k", 18, "q6_k"),
            FileType("mxfp4_moe", 38, "mxfp4"),
            FileType("mxfp4", 38, "mxfp4"),
            FileType("nvfp4", 39, "nvfp4"),
        )
    }
)
"""File types by name."""

FORMAT_PREFIX = "gguf:"
"""Beginning of the names of GGUF formats on the command line."""

SCHEME_PREFIX = "GGUF:"
"""Beginning of the names of GGUF schemes."""


def file_type(name: str) -> FileType:
    """File type of a name such as `q4_k_m`, `gguf:q4_k_m` or `GGUF:Q4_K_M`.

    Raises:
        ConfigError: no such file type; names the nearest ones.
    """
    short = name.strip().casefold().replace("-", "_").removeprefix(FORMAT_PREFIX)
    if short not in FILE_TYPES:
        known = [FORMAT_PREFIX + known for known in FILE_TYPES]
        raise ConfigError(f'unknown GGUF type "{name}"; {nearest(FORMAT_PREFIX + short, known)}')
    return FILE_TYPES[short]


def type_of_scheme(scheme: QuantizationScheme) -> GgufType | None:
    """The type whose numbers a scheme describes; None when no GGUF type stores them."""
    return next((t for t in TYPES.values() if t.preset is not None and t.scheme == scheme), None)
