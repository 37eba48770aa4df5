"""The page as HTML: one file that loads nothing and runs nothing."""

from __future__ import annotations

from pathlib import Path

from auto_round.checkpoint.disk import atomic_write_bytes
from auto_round.errors import ConfigError
from auto_round.report.draw import require_plotting
from auto_round.report.section import Page
from auto_round.report.theme import variables
from auto_round.version import __version__

GENERATOR = f"auto-round {__version__}"
_OURS = b'<meta name="generator" content="auto-round '


def render(page: Page) -> str:
    """HTML text of a page; the same page gives the same text.

    Raises:
        ConfigError: a package is missing.
    """
    require_plotting()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("auto_round.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(
        page=page, generator=GENERATOR, light=variables(dark=False), dark=variables(dark=True)
    )


def write_html(file: Path, text: str) -> None:
    """Write a page; an older one may be replaced, nothing else.

    Raises:
        ConfigError: another file is in the way, disk full, no permission.
    """
    if file.exists() and (not file.is_file() or _OURS not in file.read_bytes()[:4096]):
        raise ConfigError(
            f"{file} is there already and no page of auto-round: choose another name (-o FILE.html)"
        )
    atomic_write_bytes(file, text.encode())
