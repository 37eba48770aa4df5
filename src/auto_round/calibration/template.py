"""Chat templates for rows with images: the processor's own, or a file of the user's."""

from __future__ import annotations

from pathlib import Path

from auto_round.errors import ConfigError, nearest

OWN = (
    "default",
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "mllama",
    "mistral3",
    "mistral3_2",
    "deepseek_vl_v2",
    "phi3_v",
    "cogvlm2",
)
"""Names of templates that earlier versions had: all mean the template of the model's processor here."""


def template_text(template: str | None) -> str | None:
    """A chat template in Jinja; None for the processor's own.

    Args:
        template: a file that ends in `.jinja`, or a name of `OWN`.

    Raises:
        ConfigError: neither; names the nearest.
    """
    if template is None or template.casefold() in OWN:
        return None
    path = Path(template).expanduser()
    if path.suffix != ".jinja":
        raise ConfigError(
            f'unknown template "{template}": {nearest(template, OWN)}, or a file that ends in .jinja'
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template {path} cannot be read: {error}") from error
