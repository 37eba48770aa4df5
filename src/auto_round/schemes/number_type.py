"""What a number type is: how formats are made from a scheme's fields, and its words in configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auto_round.errors import Refusal

if TYPE_CHECKING:
    from auto_round.numerics.activation_float import InputFormat
    from auto_round.numerics.format import Format
    from auto_round.schemes.scheme import QuantizationScheme


@dataclass(frozen=True, slots=True)
class InputFields:
    """What a scheme says of the inputs of a layer, with what it leaves out filled in.

    Attributes:
        data_type: number type.
        bits: width of a code.
        group_size: numbers that share a step; -1 one step a token, 0 one a tensor.
        sym: without zero points.
        dynamic: steps are measured as the model runs, not at calibration.
    """

    data_type: str
    bits: int
    group_size: int
    sym: bool
    dynamic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedWords:
    """How compressed-tensors speaks of a type.

    Attributes:
        type: `type` of its numbers, `int` or `float`.
        format: `format` of a layer's config group: the order of its bytes.
        strategy: how weights in groups are called; rows and whole tensors have words of their own.
        scale_dtype: `scale_dtype` of the numbers' scales, where loaders tell types apart by it.
        block: rows and columns of a block, where groups are blocks.
    """

    type: str
    format: Callable[[QuantizationScheme], str]
    strategy: str = "group"
    scale_dtype: str | None = None
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberType:
    """One number type.

    Attributes:
        called: what there is of it, in words for refusals; empty where it needs no naming there.
        spellings: accepted spelling -> fields that it decides besides `data_type`.
        bits: widths of weights.
        group_sizes: sizes of groups; empty for any.
        weights: format of the weights of a scheme, or why there is none; None where it has none for these
            fields.
        input_bits: widths of inputs.
        inputs: what the input of a layer is rounded to, or why there is no such thing.
        runs_inputs: auto-round folders whose inputs are of this type are loaded.
        stored: `data_type` in configurations of auto-round folders; empty where they cannot hold it.
        compressed: words of compressed-tensors; None where it cannot hold it.
        blocks: a scheme of this type is known by the name of its format.
    """

    called: str = ""
    spellings: Mapping[str, Mapping[str, Any]]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()
    weights: Callable[[QuantizationScheme], Format | Refusal | None]
    input_bits: tuple[int, ...] = ()
    inputs: Callable[[InputFields], InputFormat | Refusal] | None = None
    runs_inputs: bool = False
    stored: str = ""
    compressed: CompressedWords | None = None
    blocks: bool = False
