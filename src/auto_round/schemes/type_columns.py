"""The columns of the table of number types: what makes a type's formats, and its words in configurations."""

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
    """The `act_*` fields of a scheme; where it leaves one out, the field of the weights stands for it.

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
    """Words for a type in the configurations of compressed-tensors.

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
        called: how messages name what is supported ("... is not there yet, CALLED are"); empty: not named.
        spellings: accepted spelling -> fields that it decides besides `data_type`.
        bits: widths of weights.
        group_sizes: sizes of groups; empty for any.
        short_groups: whether the last groups of a row may be short, as readers of the type take them.
        weights: makes the format of a scheme's weights, or says why there is none. None means that fields
            and type do not go together, with no more to say.
        input_bits: widths of inputs; empty where inputs cannot be of this type.
        inputs: makes the activation format of a layer's input, or says why there is none.
        runs_inputs: whether auto-round folders with inputs of this type can be loaded.
        stored: `data_type` in configurations of auto-round folders; empty where they cannot hold it.
        steps: `scale_dtype` that is meant where the configuration of an auto-round folder has none: the dtype
            of steps, and of floating numbers the dtype to which a code times its scale is rounded before it
            is multiplied with rounded inputs. Empty where products have no more bits than 16-bit models hold.
        compressed: words of compressed-tensors; None where it cannot hold it.
        blocks: whether people know a scheme of this type by its format's name, such as `Q4_K`.
    """

    called: str = ""
    spellings: Mapping[str, Mapping[str, Any]]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()
    short_groups: bool = False
    weights: Callable[[QuantizationScheme], Format | Refusal | None]
    input_bits: tuple[int, ...] = ()
    inputs: Callable[[InputFields], InputFormat | Refusal] | None = None
    runs_inputs: bool = False
    stored: str = ""
    steps: str = "float16"
    compressed: CompressedWords | None = None
    blocks: bool = False
