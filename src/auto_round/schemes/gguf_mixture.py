"""GGUF mixtures: which type each tensor of a file gets, as llama.cpp's own quantizer chooses it.

Source of every rule: `llama_tensor_get_type_impl`, `tensor_type_fallback` and `tensor_allows_quantization`
of llama.cpp, src/llama-quant.cpp, without the IQ and TQ types; `tests/schemes/gguf_tables.json` holds
what that quantizer chose for whole models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from auto_round.errors import InternalError
from auto_round.schemes.gguf_types import EMBEDDING, TYPES, FileType


class Category(Enum):
    """What a tensor does, as far as the rules care."""

    HEAD = "head"
    EMBEDDING = "embedding"
    QKV = "qkv"
    V = "v"
    K = "k"
    ATTN_OUT = "attention output"
    DOWN = "down"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor by name and size.

    Attributes:
        name: in the file, for example `blk.0.attn_v.weight`.
        shape: `[..., out, in]`, the row length last.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MixtureFacts:
    """What the rules know of a model.

    Attributes:
        arch: `general.architecture`.
        n_layer: number of blocks.
        n_head: attention heads of the first block.
        n_head_kv: key and value heads of the first block.
        n_expert: routed experts; 0 for a dense model.
        imatrix: importances of the inputs steer the rounding.
    """

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    imatrix: bool = False

    @property
    def gqa(self) -> int:
        """Query heads that share a key head, rounded down."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def wide_v(self) -> bool:
        """Models that llama.cpp calls 70B: their V is small, so it gets a better type."""
        if self.arch == "llama":
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return self.n_layer == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.arch)


class When(Enum):
    """Condition of a rule; `i` counts tensors of the category (blocks, for experts), `n` their number."""

    ALWAYS = "always"
    GQA4 = "four or more query heads a key head"
    FIRST_TWO = "i < 2"
    FIRST_FOUR = "i < 4"
    EIGHTH = "i < n / 8"
    SIXTEENTH = "i < n / 16"
    MORE_BITS = "first and last eighth, and every third between"
    EIGHTH_IMATRIX = "i < n / 8 and importances are known"
    EXPERTS8 = "eight experts"
    NOT_EXPERTS8 = "not eight experts"


@dataclass(frozen=True, slots=True)
class MixtureRule:
    """The first rule that applies gives the type; without one the file type's base stays.

    Attributes:
        category: tensors that it is for.
        files: file types that it is for; empty for all.
        type: what they get.
        when: condition.
        falcon: None for all architectures, True for Falcon only, False for all others.
    """

    category: Category
    files: tuple[str, ...]
    type: str
    when: When = When.ALWAYS
    falcon: bool | None = None


_5K_OUT = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")

RULES: tuple[MixtureRule, ...] = (
    *(MixtureRule(c, (), "q8_0", When.EXPERTS8) for c in (Category.V, Category.QKV, Category.K)),
    *(
        rule
        for c in (Category.V, Category.QKV)
        for rule in (
            MixtureRule(c, ("q2_k", "q2_k_s"), "q4_k", When.GQA4),
            MixtureRule(c, ("q2_k",), "q3_k"),
            MixtureRule(c, ("q3_k_m",), "q5_k", When.FIRST_TWO),
            MixtureRule(c, ("q3_k_m",), "q4_k"),
            MixtureRule(c, ("q3_k_l",), "q5_k"),
            MixtureRule(c, ("q4_k_m", "q5_k_m"), "q6_k", When.MORE_BITS),
            MixtureRule(c, ("q4_k_s",), "q5_k", When.FIRST_FOUR),
        )
    ),
    MixtureRule(Category.DOWN, ("q2_k",), "q3_k"),
    MixtureRule(Category.DOWN, ("q2_k_s",), "q4_k", When.EIGHTH),
    MixtureRule(Category.DOWN, ("q3_k_m",), "q5_k", When.SIXTEENTH),
    MixtureRule(Category.DOWN, ("q3_k_m",), "q4_k", When.MORE_BITS, falcon=True),
    MixtureRule(Category.DOWN, ("q3_k_m",), "q4_k", falcon=False),
    MixtureRule(Category.DOWN, ("q3_k_l",), "q4_k", falcon=True),
    MixtureRule(Category.DOWN, ("q3_k_l",), "q5_k"),
    MixtureRule(Category.DOWN, ("q4_k_m",), "q6_k", When.SIXTEENTH, falcon=True),
    MixtureRule(Category.DOWN, ("q4_k_m",), "q5_k", When.MORE_BITS, falcon=True),
    MixtureRule(Category.DOWN, ("q4_k_m",), "q6_k", When.MORE_BITS, falcon=False),
    MixtureRule(Category.DOWN, ("q5_k_m",), "q6_k", When.MORE_BITS),
    MixtureRule(Category.DOWN, ("q4_k_s",), "q5_k", When.EIGHTH, falcon=False),
    MixtureRule(Category.DOWN, ("q4_0",), "q4_1", When.EIGHTH_IMATRIX),
    MixtureRule(Category.DOWN, ("q5_0",), "q5_1", When.EIGHTH_IMATRIX),
    MixtureRule(Category.ATTN_OUT, ("q3_k_l",), "q4_k", falcon=True),
    MixtureRule(Category.ATTN_OUT, _5K_OUT, "q5_k", When.EXPERTS8, falcon=False),
    MixtureRule(Category.ATTN_OUT, ("q2_k",), "q3_k", When.NOT_EXPERTS8, falcon=False),
    MixtureRule(Category.ATTN_OUT, ("q3_k_m",), "q4_k", When.NOT_EXPERTS8, falcon=False),
    MixtureRule(Category.ATTN_OUT, ("q3_k_l",), "q5_k", When.NOT_EXPERTS8, falcon=False),
)
"""Rules inside the blocks, strongest first. A fused `attn_qkv` follows V: llama.cpp has rules of its own for
it, behind these and therefore never reached."""

WIDER_V: Mapping[str, str] = {"q3_k": "q5_k", "q4_k": "q5_k"}
"""V of models with few and small V matrices (`MixtureFacts.wide_v`), after the rules."""

NARROWER_ROWS: Mapping[str, str] = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "nvfp4": "mxfp4",
}
"""Type for rows that are no multiple of 256 (NVFP4: 64); 16 bits when they are no multiple of 32 either."""

BY_PLACE: Mapping[str, tuple[str, str, str]] = {
    "q2_k_mixed": ("q2_k", "q4_k", "q8_0"),
    "mxfp4_moe": ("mxfp4", "q8_0", "q8_0"),
    "mxfp4": ("mxfp4", "mxfp4", "q8_0"),
    "nvfp4": ("nvfp4", "nvfp4", "q8_0"),
}
"""Mixtures with one type for routed experts, one for the other layers, and one for embedding and head.

llama.cpp has the second only; the last is for models without experts, and for those stored in MXFP4."""

_KEPT_NAMES = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    *(
        f"time_mix_{name}.weight"
        for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
)
"""Parts of names that no mixture touches. Source: `tensor_allows_quantization` of src/llama-quant.cpp."""
_KEPT = ("position_embd.weight", "token_types.weight")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"_exps\.weight$")


def category_of(name: str) -> Category:
    """Category of a tensor name."""
    if name == "output.weight":
        return Category.HEAD
    if name == EMBEDDING:
        return Category.EMBEDDING
    table = (
        ("attn_qkv.weight", Category.QKV),
        ("attn_kv_b.weight", Category.QKV),
        ("attn_v.weight", Category.V),
        ("attn_k.weight", Category.K),
        ("attn_output.weight", Category.ATTN_OUT),
        ("ffn_down", Category.DOWN),
    )
    return next((category for part, category in table if part in name), Category.OTHER)


def is_quantizable(tensor: Shape) -> bool:
    """Whether a tensor gets the type of a mixture; others have 32 bits, or what a template has.

    Norms, biases, routers, convolutions and position embeddings are not: they are small and matter.
    """
    name = tensor.name
    return (
        any(n != 1 for n in tensor.shape[:-1])
        and name.endswith("weight")
        and name not in _KEPT
        and not any(part in name for part in _KEPT_NAMES)
    )


def choose_types(facts: MixtureFacts, wanted: FileType, tensors: Iterable[Shape]) -> dict[str, str]:
    """Type of every tensor of a file.

    Args:
        facts: of the model.
        wanted: the file type.
        tensors: all of them, in any order: the rules count in llama.cpp's order, by block and name.

    Returns:
        Tensor name -> name of its type, in the order given.
    """
    listed = list(tensors)
    tied = all(t.name != "output.weight" for t in listed)
    counted = dict.fromkeys(Category, 0)
    total_v = sum(category_of(t.name) in (Category.V, Category.QKV) for t in listed)
    found: dict[str, str] = {}
    for tensor in sorted(listed, key=_order):
        category = category_of(tensor.name)
        if not is_quantizable(tensor):
            found[tensor.name] = "f32"
            continue
        if category is Category.DOWN:
            position = (_block(tensor.name) if facts.n_expert > 1 else counted[Category.DOWN], facts.n_layer)
        else:
            position = (counted[Category.V], total_v)
        chosen = _choose(facts, wanted, tensor, category, position, tied=tied)
        counted[Category.V if category is Category.QKV else category] += 1
        found[tensor.name] = fitting(chosen, tensor.shape[-1])
    return {t.name: found[t.name] for t in listed}


def fitting(chosen: str, n_in: int) -> str:
    """The type itself, or the nearest one that holds rows of `n_in` weights."""
    if TYPES[chosen].fits(n_in):
        return chosen
    other = NARROWER_ROWS.get(chosen, chosen)
    return other if TYPES[other].fits(n_in) else "f16"


def _order(tensor: Shape) -> tuple[int, str]:
    match = _BLOCK.match(tensor.name)
    return (int(match[1]) if match else -1, tensor.name)


def _block(name: str) -> int:
    match = _BLOCK.match(name)
    if match is None:
        raise InternalError(f'"{name}" is in no block')
    return int(match[1])


def _choose(
    facts: MixtureFacts,
    wanted: FileType,
    tensor: Shape,
    category: Category,
    position: tuple[int, int],
    *,
    tied: bool,
) -> str:
    """Type before the row length has its say."""
    base = wanted.base
    if TYPES[base].preset is None:
        return base
    if wanted.name in BY_PLACE:
        return _by_place(tensor.name, category, *BY_PLACE[wanted.name])
    if category is Category.HEAD or (tied and category is Category.EMBEDDING):
        plain = facts.arch == "falcon" or not TYPES[base].fits(tensor.shape[-1]) or base == "q8_0"
        return "q8_0" if plain else "q6_k"
    chosen = next(
        (rule.type for rule in RULES if _applies(rule, facts, wanted.name, category, position)), base
    )
    if facts.wide_v and category in (Category.V, Category.QKV):
        return WIDER_V.get(chosen, chosen)
    return chosen


def _by_place(name: str, category: Category, experts: str, layers: str, outside: str) -> str:
    if category in (Category.HEAD, Category.EMBEDDING):
        return outside
    return experts if _EXPERTS.search(name) else layers


def _applies(
    rule: MixtureRule, facts: MixtureFacts, wanted: str, category: Category, position: tuple[int, int]
) -> bool:
    if rule.category is not category or (rule.files and wanted not in rule.files):
        return False
    if rule.falcon is not None and rule.falcon is not (facts.arch == "falcon"):
        return False
    return _holds(rule.when, facts, position)


def _holds(when: When, facts: MixtureFacts, position: tuple[int, int]) -> bool:
    i, n = position
    return {
        When.ALWAYS: True,
        When.GQA4: facts.gqa >= 4,
        When.FIRST_TWO: i < 2,
        When.FIRST_FOUR: i < 4,
        When.EIGHTH: i < n // 8,
        When.SIXTEENTH: i < n // 16,
        When.MORE_BITS: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
        When.EIGHTH_IMATRIX: facts.imatrix and i < n // 8,
        When.EXPERTS8: facts.n_expert == 8,
        When.NOT_EXPERTS8: facts.n_expert != 8,
    }[when]
