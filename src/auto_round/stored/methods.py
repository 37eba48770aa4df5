"""The table of quantization methods: `quant_method` -> how folders of it are understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, Refusal, UnsupportedError
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.schemes.condense import some
from auto_round.stored.blocks_fp8 import read_fp8
from auto_round.stored.compressed import read_compressed
from auto_round.stored.experts_mxfp4 import read_mxfp4
from auto_round.stored.packed import StoredWeight
from auto_round.stored.packed_words import read_words

Reader = Callable[[Mapping[str, Any], Checkpoint], list[StoredWeight]]
"""`quantization_config` and the headers of a folder -> its packed weights.

A reader raises `UnsupportedError` for what it does not know, `CheckpointError` for a damaged folder and
`ConfigError` for a configuration that cannot be."""


@dataclass(frozen=True, slots=True)
class StorageMethod:
    """One way of storing models.

    Attributes:
        read: finds the packed weights.
        spare: last names of tensors that belong to how the quantized model runs (scales of activations and
            caches): a plain model has none of them.
    """

    read: Reader
    spare: tuple[str, ...] = ()


_WORDS = StorageMethod(read_words, ("input_scale", "input_global_scale", "act_scale"))

METHODS: dict[str, StorageMethod] = {
    "auto-round": _WORDS,
    "gptq": StorageMethod(read_words),
    "awq": StorageMethod(read_words),
    COMPRESSED_TENSORS: StorageMethod(
        read_compressed,
        (
            "weight_zero_point",  # beside symmetric weights, where older releases wrote zeros
            *("input_scale", "input_zero_point", "input_global_scale"),
            *("output_scale", "output_zero_point", "output_global_scale"),
            *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
        ),
    ),
    "fp8": StorageMethod(read_fp8, ("activation_scale", "input_scale", "k_scale", "v_scale")),
    "fbgemm-fp8": StorageMethod(read_fp8, ("input_scale_ub",)),
    "mxfp4": StorageMethod(read_mxfp4),
}
"""Ways of storing models by `quant_method`, with `-` for `_`."""

_SYNONYMS = {"autoround": "auto-round", "intel/auto-round": "auto-round"}
"""Other words for a method in older folders."""


def method_of(config: Mapping[str, Any], where: str) -> StorageMethod:
    """How a folder with this `quantization_config` is understood.

    Raises:
        UnsupportedError: a method that this version does not read; names it.
    """
    said = str(config.get("quant_method", ""))
    name = said.casefold().replace("_", "-")
    found = METHODS.get(_SYNONYMS.get(name, name))
    if found is None:
        known = ", ".join(METHODS)
        raise UnsupportedError(
            f'the model in "{where}" is quantized by "{said or "a method that it does not name"}"',
            [Refusal("models", f"read are {known}, and GGUF files", "start from the original weights")],
        )
    return found


def understand(config: Mapping[str, Any], files: Checkpoint) -> tuple[list[StoredWeight], set[str]]:
    """Packed weights of a folder, and the tensors that a plain model does without.

    Raises:
        ConfigError: a configuration that cannot be.
        UnsupportedError: a way of storing weights that this version does not read; names it and the layers.
        CheckpointError: tensors that contradict the configuration.
    """
    method = method_of(config, str(files.folder))
    packed = method.read(config, files)
    mistakes = [mistake for each in packed if (mistake := each.mistake(files))]
    if mistakes:
        raise CheckpointError(
            f"{files.folder}: its tensors are not what its quantization_config says: {some(mistakes, most=4)}"
        )
    used = {name for each in packed for name in each.tensors}
    spare = {n for n in files.names if n not in used and n.rpartition(".")[2] in method.spare}
    return packed, spare
