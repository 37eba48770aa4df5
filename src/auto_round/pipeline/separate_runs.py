"""Formats that need plans of their own: one request becomes several runs, each in its own folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from auto_round.config.groups import SchemeOptions
from auto_round.config.options import Options
from auto_round.export.table import plans_alone, takes_any_plan
from auto_round.pipeline.deciding.job import folder_of


def runs_of(options: Options) -> tuple[Options, ...]:
    """The runs of a request: one for all formats that share a plan, then one for each that makes its own.

    Formats that take any plan belong to the first run. A format that makes its own plan does not use the
    scheme of the others.
    """
    names = options.output.formats
    alone = [name for name in names if plans_alone(name)]
    sharing = [name for name in names if name not in alone and not takes_any_plan(name)]
    if len(alone) + bool(sharing) < 2:
        return (options,)
    groups = [sharing, *([name] for name in alone)] if sharing else [[name] for name in alone]
    groups[0] += [name for name in names if takes_any_plan(name)]
    return tuple(_run(options, group, own_scheme=not sharing) for group in groups)


def _run(options: Options, formats: list[str], *, own_scheme: bool) -> Options:
    """One run; it has a folder of its own below the request's, unless its formats have one each."""
    root = Path(options.output.output_dir)
    folder = root / folder_of(formats[0]) if len(formats) == 1 else root
    output = replace(options.output, format=",".join(formats), output_dir=str(folder))
    scheme, given = options.scheme, options.given
    if plans_alone(formats[0]) and not own_scheme:
        scheme = replace(
            SchemeOptions(), layer_config=scheme.layer_config, ignore_layers=scheme.ignore_layers
        )
        given -= {"scheme"}
    return replace(options, output=output, scheme=scheme, given=given)
