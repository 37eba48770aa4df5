"""`auto-round convert`: a quantized folder in another format, with the same codes and steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from auto_round.cli.flags import Parser
from auto_round.cli.quantize import quiet_transformers
from auto_round.consumers.verdict import judge_folder
from auto_round.units import size


def convert(words: Sequence[str]) -> str:
    """Do what the words say; returns what to print.

    Raises:
        AutoRoundError: wrong words, or the conversion is not possible; see `convert_folder`.
    """
    from auto_round.pipeline.converting.convert import convert_folder

    parser = _parser()
    found = parser.parse_all(words)
    if found.help or found.folder is None:
        return parser.format_help().rstrip()
    if found.format is None:
        parser.error("say which format is wanted, for example: auto-round convert FOLDER --format auto_awq")
    quiet_transformers()
    done = convert_folder(
        found.folder, found.format, found.output, overwrite=found.overwrite, verify=found.verify
    )
    rows = {
        "written": str(done.folder),
        "format": done.format,
        "size": size(done.nbytes),
        "layers": f"{done.layers}, with the same codes, steps and zero points",
        "reloaded": "it loads and predicts",
    }
    if skipped := done.verified.get("skipped"):
        rows["reloaded"] = f"no, {skipped}"
    lines = [f"{label:<14}{text}" for label, text in rows.items()]
    return "\n".join([*lines, *(f"{v.engine:<14}{v.text}" for v in judge_folder(done.folder))])


def _parser() -> Parser:
    parser = Parser(
        prog="auto-round convert",
        description="Write a quantized folder in another format without changing a code, a step or a "
        "zero point. What the format cannot hold exactly is refused.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        help="folder of quant_method auto-round, gptq, awq, compressed-tensors or fp8",
    )
    parser.add_argument(
        "--format",
        help="format to write: auto_round[:auto_gptq|:gptqmodel|:auto_awq], auto_gptq, "
        "gptqmodel, auto_awq, llm_compressor",
    )
    parser.add_argument(
        "--output", "--output_dir", "--output-dir", metavar="DIR", help="new folder [FOLDER-FORMAT]"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="do again what is finished, and replace an older output that does not say what it is",
    )
    parser.add_argument(
        "--no_verify", "--no-verify", dest="verify", action="store_false", help="do not load the new folder"
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    return parser
