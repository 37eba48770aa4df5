"""`auto-round inspect`: engines of a quantized folder, roles of a plain one's matrices, types of a GGUF."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auto_round.cli.flags import Parser
from auto_round.consumers.folder import is_quantized
from auto_round.consumers.inventory import Inventory, take_inventory
from auto_round.errors import UnsupportedError
from auto_round.export.gguf.source import SUFFIX, gguf_file, read_head
from auto_round.facts.roles import render_roles
from auto_round.models.folder import FolderSource
from auto_round.models.source import ModelSource
from auto_round.units import size

Rows = list[tuple[str, str]]


def inspect(words: Sequence[str]) -> str:
    """Do what the words say; returns what to print.

    Raises:
        AutoRoundError: wrong words, no model, or a damaged one.
    """
    parser = _parser()
    found = parser.parse_all(words)
    if found.help or found.folder is None:
        return parser.format_help().rstrip()
    folder = Path(found.folder).expanduser()
    if (file := _named(folder)) is not None:
        held = _gguf(file)
        return _json(held) if found.json else _aligned(_gguf_rows(held))
    if is_quantized(folder):
        inventory = take_inventory(folder)
        return _json(inventory.to_dict()) if found.json else _aligned(_contents(inventory))
    with FolderSource.open(folder, trust_remote_code=found.trust_remote_code) as source:
        return _json(_plain(source)) if found.json else _text(source)


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False)


def _contents(inventory: Inventory) -> Rows:
    """Label and text of what a quantized folder holds."""
    rows = [
        ("format", inventory.format),
        (
            "size",
            f"{size(inventory.nbytes)} of tensors, {inventory.bits_per_weight:.3f} bits per quantized weight",
        ),
    ]
    for label, (count, weights) in inventory.schemes.items():
        rows.append((label, f"{count} matrices, {weights:,} weights"))
    for label, names in inventory.kept.items():
        rows.append((label, f"{len(names)} matrices: {inventory.condensed(label)}"))
    return rows + [(verdict.engine, verdict.text) for verdict in inventory.verdicts]


def _named(path: Path) -> Path | None:
    """The GGUF file that a path means; None for anything else, which other readers answer."""
    return gguf_file(path) if path.is_dir() or (path.suffix == SUFFIX and path.is_file()) else None


def _gguf(file: Path) -> dict[str, Any]:
    """What a GGUF file holds: type -> how many tensors, weights and bytes."""
    stored, metadata = read_head(file)
    types: dict[str, tuple[int, int, int]] = {}
    for tensor in stored.values():
        count, weights, nbytes = types.get(tensor.kind, (0, 0, 0))
        added = math.prod(tensor.shape)
        types[tensor.kind] = (count + 1, weights + added, nbytes + tensor.nbytes)
    return {
        "file": file.name,
        "architecture": metadata.get("general.architecture"),
        "types": {
            kind: {"tensors": count, "weights": weights, "bytes": nbytes}
            for kind, (count, weights, nbytes) in sorted(types.items(), key=lambda item: -item[1][1])
        },
    }


def _gguf_rows(held: dict[str, Any]) -> Rows:
    weights, nbytes = (sum(each[what] for each in held["types"].values()) for what in ("weights", "bytes"))
    rows = [
        ("format", f"GGUF, architecture {held['architecture']}: {held['file']}"),
        ("size", f"{size(nbytes)} of tensors, {8 * nbytes / weights:.3f} bits per weight"),
    ]
    for kind, each in held["types"].items():
        rows.append((kind.upper(), f"{each['tensors']} tensors, {each['weights']:,} weights"))
    return rows


def _text(source: ModelSource) -> str:
    """What a plain model consists of, and whether its blocks can be tuned."""
    found = _plain(source)
    rows = [(label, str(found[label])) for label in ("model", "blocks", "tuning")]
    rows += [(role, f"{n} matrices, {weights:,} weights") for role, (n, weights) in _sums(source).items()]
    return f"{_aligned(rows)}\n\n{render_roles(source.roles)}"


def _plain(source: ModelSource) -> dict[str, Any]:
    """The same as fields, for JSON."""
    kinds = Counter(source.block_classes)
    return {
        "model": f"{source.model_class} ({source.config.model_type}), {source.facts.auto_class}",
        "blocks": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        "tuning": _tuning(source),
        "roles": [row.to_dict() for row in source.roles],
    }


def _tuning(source: ModelSource) -> str:
    """Whether blocks can be tuned one by one with text, found by a run without weights."""
    try:
        skipped = source.refuse_untraceable().skipped
    except UnsupportedError as error:
        return "refused: " + "; ".join(refusal.reason for refusal in error.refusals)
    if not skipped:
        return "block by block"
    return f"block by block; only rows with images run blocks {', '.join(map(str, sorted(skipped)))}"


def _sums(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Role -> number of its matrices and of their weights."""
    found: dict[str, tuple[int, int]] = {}
    for row in source.roles:
        count, weights = found.get(row.role, (0, 0))
        found[row.role] = (count + row.count, weights + row.weights)
    return found


def _aligned(rows: Rows) -> str:
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)


def _parser() -> Parser:
    parser = Parser(
        prog="auto-round inspect",
        description="Say what is in a model's folder. Of a quantized one: which engines load it, with which "
        "kernels, or why not. Of a plain one: the role of every matrix, and whether its blocks can be tuned. "
        "Of a GGUF file: how many tensors have which type. Reads configurations and headers only.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", help="folder of a model, quantized or not, or a GGUF file"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    return parser
