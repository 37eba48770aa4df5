"""README.md of an output folder: what was done to the model and what it measured. No dates, no timings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from auto_round.checkpoint.disk import atomic_write_bytes
from auto_round.facts.compressed import COMPRESSED_TENSORS
from auto_round.models.auto_classes import CAUSAL_LM
from auto_round.version import __version__


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the model before and after.

    Attributes:
        what: for example `perplexity, 32 held-out rows of python-docs`.
        after: value of the quantized model.
        before: value of the original; None where it means nothing (a distance between the two).
    """

    what: str
    after: float
    before: float | None = None


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a model card says.

    Attributes:
        name: name of the original model, for people.
        scheme: for example `W4A16`.
        exporter: name of the output format.
        quant_method: what the folder's `config.json` calls itself; None for one that looks unquantized.
        method: one line, for example `SignRound, 200 steps a block`.
        bits_per_weight: stored bits per quantized weight: codes, steps and zero points.
        bytes_before: bytes of all tensors of the original.
        bytes_after: bytes of all tensors of the output.
        quantized: number of matrices that were quantized.
        kept: what was kept and why, one line each.
        data: calibration data, one line; empty when none was used.
        measured: figures.
        hub_id: `owner/name` of the original on the Hugging Face hub; None for a local folder.
        license: license identifier of the original; None when unknown.
        options: options of the run that differ from the defaults.
        engines: engines that load the folder, by its configuration and headers; empty when unknown.
        auto_class: class of Transformers that loads the folder.
        library: package that loads the output.
        command: shell command that runs it; empty where Transformers does.
    """

    name: str
    scheme: str
    exporter: str
    method: str
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    quantized: int
    kept: Sequence[str] = ()
    data: str = ""
    measured: Sequence[Figure] = ()
    hub_id: str | None = None
    license: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    quant_method: str | None = "auto-round"
    engines: str = ""
    auto_class: str = CAUSAL_LM
    library: str = "transformers"
    command: str = ""


def model_card(facts: CardFacts) -> str:
    """Text of the README.md; the same facts give the same text."""
    return "\n".join([*_front_matter(facts), *_summary(facts), *_measured(facts), *_usage(facts)])


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into an output folder.

    Raises:
        ConfigError: disk full, no permission.
        CheckpointError: any other failure of the file system.
    """
    atomic_write_bytes(folder / "README.md", model_card(facts).encode())


def _front_matter(facts: CardFacts) -> list[str]:
    """YAML block that the hub reads; JSON strings are YAML strings."""
    lines = ["---"]
    if facts.license:
        lines.append(f"license: {json.dumps(facts.license)}")
    if facts.hub_id:
        lines += [f"base_model: {json.dumps(facts.hub_id)}", "base_model_relation: quantized"]
    lines += [f"library_name: {facts.library}", "tags:", "- auto-round", "- quantized"]
    if facts.quant_method in _PEERS:
        lines.append(f"- {facts.quant_method}")
    return [*lines, "---", ""]


def _summary(facts: CardFacts) -> list[str]:
    rows = {
        "Original": facts.hub_id or facts.name,
        "Scheme": facts.scheme,
        "Format": facts.exporter,
        "Method": facts.method,
        "Calibration data": facts.data or "none",
        "Quantized matrices": str(facts.quantized),
        "Bits per quantized weight": f"{facts.bits_per_weight:.3f}",
        "Size of all tensors": f"{_mib(facts.bytes_before)} before, {_mib(facts.bytes_after)} after",
        **({"Loads in, by its headers": facts.engines} if facts.engines else {}),
        **{f"Option `{key}`": f"`{value}`" for key, value in sorted(facts.options.items())},
    }
    lines = [
        f"# {facts.name}, {facts.scheme}",
        "",
        f"Quantized with auto-round {__version__}.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()), ""]
    if facts.kept:
        lines += ["Kept at 16 bits:", "", *(f"- {line}" for line in facts.kept), ""]
    return lines


def _measured(facts: CardFacts) -> list[str]:
    if not facts.measured:
        return []
    rows = [
        f"| {_cell(m.what)} | {'' if m.before is None else _number(m.before)} | {_number(m.after)} |"
        for m in facts.measured
    ]
    return ["## Measured", "", "| | before | after |", "|---|---|---|", *rows, ""]


_PEERS = {"gptq": "vLLM, SGLang and GPTQModel", "awq": "vLLM, SGLang, GPTQModel and AutoAWQ"}
"""Who loads a folder of a `quant_method` as it is, besides Transformers."""


def _package(quant_method: str) -> str:
    """Package that Transformers needs to load a folder."""
    return quant_method if quant_method == COMPRESSED_TENSORS else "auto-round"


def _usage(facts: CardFacts) -> list[str]:
    if facts.command:
        return ["## Use", "", "```sh", facts.command, "```", ""]
    needs = [] if facts.quant_method is None else [f"# pip install {_package(facts.quant_method)}"]
    peers = _PEERS.get(facts.quant_method or "")
    names, settings = f"{facts.auto_class}, AutoTokenizer", ""
    if peers is not None:
        names, settings = (
            f"{facts.auto_class}, AutoRoundConfig, AutoTokenizer",
            ", quantization_config=AutoRoundConfig()",
        )
    return [
        "## Use",
        "",
        *([f"{peers} load this folder as it is. With Transformers:", ""] if peers else []),
        "```python",
        *needs,
        f"from transformers import {names}",
        "",
        f'model = {facts.auto_class}.from_pretrained("path/to/this/folder"{settings})',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
