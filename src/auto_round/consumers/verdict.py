"""Whether each engine loads a folder, with which kernels, or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auto_round.consumers.compare import compare
from auto_round.consumers.engines import AUTO_ROUND, ENGINES, GPTQMODEL, NAMES, VLLM, Engine
from auto_round.consumers.fields import FLOAT_BITS, CannotReadError, CompressedFields, Fields
from auto_round.consumers.folder import Folder, read_folder
from auto_round.consumers.humming import runs_with_humming
from auto_round.consumers.kernels import HALF_ONLY, MARLIN
from auto_round.consumers.kernels_float import remarks_on_floats
from auto_round.consumers.modules import LM_HEAD
from auto_round.consumers.ours import TRANSFORMERS, ask_ourselves
from auto_round.layouts.table import PACKING_FORMAT
from auto_round.schemes.condense import some
from auto_round.stored.matrices import AWQ, BLOCKS, GPTQ, OTHER

_LLAMA_4 = {"llama4", "llama4_text"}
_TURNED = (".q_proj", ".k_proj")
"""Matrices whose rows vLLM turns for its rotary embedding under names of compressed-tensors alone.
Source: vLLM `models/llama4.py` (`permute_qk_weight_for_rotary`)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one engine does with a folder.

    Attributes:
        engine: its name.
        loads: whether it loads the folder.
        kernels: kernel -> modules that it multiplies; empty where the engine decides by device.
        reasons: why it does not load.
        notes: what a user has to know or do.
    """

    engine: str
    loads: bool
    kernels: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line for people, without the engine's name."""
        notes = f" ({'; '.join(self.notes)})" if self.notes else ""
        if not self.loads:
            return f"no: {'; '.join(self.reasons)}{notes}"
        kernels = ", ".join(f"{name} ({count})" for name, count in self.kernels.items())
        return f"yes{f', {kernels}' if kernels else ''}{notes}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what is empty is left out."""
        found = {"kernels": dict(self.kernels), "reasons": list(self.reasons), "notes": list(self.notes)}
        return {"loads": self.loads, **{key: value for key, value in found.items() if value}}


def judge_folder(folder: str | Path | Folder) -> tuple[Verdict, ...]:
    """What Transformers, vLLM, SGLang and GPTQModel do with a folder, from its configuration and headers.

    Raises:
        ConfigError: no folder of a quantized model.
        CheckpointError: a damaged file.
    """
    found = folder if isinstance(folder, Folder) else read_folder(folder)
    return (_transformers(found), *(_judge(found, name) for name in NAMES))


def _transformers(folder: Folder) -> Verdict:
    reasons, notes = ask_ourselves(folder)
    return Verdict(TRANSFORMERS, not reasons, {}, reasons, notes)


def _judge(folder: Folder, name: str) -> Verdict:
    orders = {matrix.order for matrix in folder.packed}
    rows = [row for row in ENGINES if row.name == name and row.method == folder.method]
    if not rows:
        return Verdict(name, loads=False, reasons=(f"it does not read {folder.method or 'this'} folders",))
    fitting = [row for row in rows if not row.order or orders == {row.order}]
    if not fitting or not _order_agrees(folder, fitting[0]):
        return Verdict(name, loads=False, reasons=(_order_text(folder, orders),))
    return _replay(folder, fitting[0])


def _order_agrees(folder: Folder, engine: Engine) -> bool:
    """Whether a row is for the folder's order of bytes, which `packing_format` names where it is there."""
    packing = folder.quantization.get(PACKING_FORMAT)
    known = [order for order in ("gptq", "awq") if order in str(packing)]
    return not engine.order or packing is None or not known or engine.order in known


def _order_text(folder: Folder, orders: set[str]) -> str:
    stated = folder.quantization.get(PACKING_FORMAT, folder.method)
    if len(orders) > 1 and folder.method == AUTO_ROUND:
        return "it reads one packing_format for a folder, and layers here name another one"
    if orders & {OTHER, BLOCKS}:
        return f"not known: the table of engines has no row for {stated}"
    return f"the tensors are packed as {' and '.join(sorted(orders))}, the configuration says {stated}"


def _replay(folder: Folder, engine: Engine) -> Verdict:
    """Go through the engine's modules as it would itself."""
    reasons = list(engine.demands.complaints(folder))
    notes: list[str] = []
    complaints: dict[str, list[str]] = {}
    doubts: dict[str, list[str]] = {}
    used: Counter[str] = Counter()
    unrounded = False
    remarks: dict[str, None] = {}
    if not reasons:
        for module in engine.modules(folder.matrices):
            try:
                fields = engine.read(folder, module)
                doubtful = compare(module, fields)
                if doubtful:
                    doubts.setdefault(doubtful, []).append(module.name)
                elif fields is not None:
                    kernel = engine.kernel(module, fields)
                    used[kernel] += 1
                    remarks |= dict.fromkeys(remarks_on_floats(engine.name, fields))
                    unrounded |= kernel.startswith(MARLIN) and _rounds_activations(fields)
            except CannotReadError as error:
                complaints.setdefault(str(error).replace(module.name, "{}"), []).append(module.name)
    reasons += [_sentence(text, names) for text, names in complaints.items()]
    reasons += _other_reasons(folder, engine)
    notes += [_sentence(text, names) for text, names in doubts.items()]
    if any(kernel in HALF_ONLY for kernel in used) and folder.dtype not in ("", "float16"):
        notes.append("its kernel computes in float16: pass --dtype float16")
    notes += [] if reasons else remarks
    if unrounded:
        notes.append("Marlin leaves activations in 16 bits")
    if reasons and engine.name == VLLM and runs_with_humming(folder):
        notes.append("runs with --quantization humming")
    return Verdict(engine.name, not reasons, {} if reasons else dict(used), tuple(reasons), tuple(notes))


def _rounds_activations(fields: Fields) -> bool:
    return isinstance(fields, CompressedFields) and fields.activations < FLOAT_BITS


def _other_reasons(folder: Folder, engine: Engine) -> Iterator[str]:
    tied = folder.config.get("tie_word_embeddings")
    heads = [matrix.name for matrix in folder.packed if matrix.name.rpartition(".")[2] == LM_HEAD]
    if heads and tied:
        yield f"{heads[0]} is packed, but config.json ties it to the embedding"
    reordered = folder.quantization.get("desc_act") and folder.quantization.get("group_size") != -1
    if engine.name == VLLM and engine.method == "gptq" and reordered:
        yield "it no longer takes inputs reordered by activation (desc_act)"
    asymmetric = folder.quantization.get("sym") is False
    first = folder.quantization.get("checkpoint_format", folder.quantization.get("format", "gptq")) == "gptq"
    if engine.name == GPTQMODEL and engine.method == "gptq" and asymmetric and first:
        yield "it refuses zero points stored minus one; store them as gptq_v2"
    text = folder.config.get("text_config") or {}
    turned = [m.name for m in folder.packed if m.order in (GPTQ, AWQ) and m.name.endswith(_TURNED)]
    if (
        engine.name == VLLM
        and turned
        and _LLAMA_4 & {folder.config.get("model_type"), text.get("model_type")}
    ):
        yield (
            f"it leaves the rows of {some(turned)} in an order that Llama 4 does not have there, without an "
            "error; keep q_proj, k_proj and v_proj in 16 bits, or use the format llm_compressor"
        )


def _sentence(text: str, names: Sequence[str]) -> str:
    return text.replace("{}", some(names)) if "{}" in text else f"{text}: {some(names)}"
