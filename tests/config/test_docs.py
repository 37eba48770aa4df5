"""The manual's tables are the options themselves."""

from __future__ import annotations

from pathlib import Path

from auto_round.config import EVALUATION_GROUPS, environment_markdown, options_markdown

MANUAL = Path(__file__).parents[2] / "docs" / "options.md"


def test_manual_lists_every_option_and_variable() -> None:
    text = MANUAL.read_text(encoding="utf-8")
    remedy = "write docs/options.md anew: python tests/config/test_docs.py"
    assert options_markdown().strip() in text, remedy
    assert options_markdown(EVALUATION_GROUPS).strip() in text, remedy
    assert environment_markdown().strip() in text, remedy


def write_manual() -> None:
    """Write docs/options.md from the options."""
    MANUAL.write_text(
        "# Options\n\nEvery option of `auto-round` and `AutoRound`. This page is generated from "
        "`auto_round.config`.\n\n"
        + options_markdown().strip()
        + "\n\n## Evaluation\n\nOptions of `auto-round eval`, beside those of the model. From Python they "
        "are fields of\n`EvaluationOptions` and `FidelityOptions` ([evaluation.md](evaluation.md)).\n\n"
        + options_markdown(EVALUATION_GROUPS).strip()
        + "\n\n## Environment variables\n\n"
        + environment_markdown().strip()
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    write_manual()
