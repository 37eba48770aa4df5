"""`auto-round inspect`: what is in a quantized folder, and which engines load it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from auto_round.cli.flags import Parser
from auto_round.consumers.inventory import Inventory, take_inventory
from auto_round.units import size


def inspect(words: Sequence[str]) -> str:
    """Do what the words say; returns what to print.

    Raises:
        AutoRoundError: wrong words, no folder of a quantized model, or a damaged one.
    """
    parser = _parser()
    found = parser.parse_args(list(words))
    if found.help or found.folder is None:
        return parser.format_help().rstrip()
    inventory = take_inventory(found.folder)
    return json.dumps(inventory.to_dict(), indent=2, ensure_ascii=False) if found.json else _text(inventory)


def _text(inventory: Inventory) -> str:
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
    rows += [(verdict.engine, verdict.text) for verdict in inventory.verdicts]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)


def _parser() -> Parser:
    parser = Parser(
        prog="auto-round inspect",
        description="Say what is in a quantized folder and which engines load it, with which kernels, or why "
        "not. Reads the configuration and the headers of the weight files only.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="folder of a quantized model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    return parser
