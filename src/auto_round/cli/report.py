"""`auto-round report`: the page of a finished run, or one that compares several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from auto_round.cli.flags import Parser


def report(words: Sequence[str]) -> str:
    """Do what the words say; returns what to print.

    Raises:
        AutoRoundError: wrong words, no finished run, a missing package, or no place for the page.
    """
    parser = _parser()
    found = parser.parse_all(words)
    if found.help or not found.run:
        return parser.format_help().rstrip()
    from auto_round.report.make import make_page

    return f"written     {make_page([Path(run) for run in found.run], found.output)}"


def _parser() -> Parser:
    parser = Parser(
        prog="auto-round report",
        description="Draw the page of a finished run (report.html in its folder), or a page that compares "
        "several: size against quality, losses, divergences. Everything comes from the records of the runs "
        "(report.json, report_run.json); no model is loaded.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("run", metavar="RUN", nargs="*", help="output folder of a finished run")
    parser.add_argument("-o", "--output", metavar="FILE.html", type=Path, help="page to write")
    parser.add_argument("-h", "--help", action="store_true", help="show this text and stop")
    return parser
