"""Formats that need plans of their own: one request becomes several runs, each in its own folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from auto_round.config.groups import SchemeOptions
from auto_round.config.options import Options
from auto_round.export.table import BESIDE_GGUF
from auto_round.pipeline.job import folder_of
from auto_round.schemes.gguf_types import FORMAT_PREFIX


def runs_of(options: Options) -> tuple[Options, ...]:
    """The runs that a request comes to: packed formats first, then each GGUF file.

    Packed whole numbers of all formats come from one plan. Each GGUF file has a plan of its own, for which
    the scheme of the others says nothing. `fake` belongs to the first plan.
    """
    names = options.output.formats
    files = [name for name in names if name.startswith(FORMAT_PREFIX)]
    packed = [name for name in names if name not in files and name not in BESIDE_GGUF]
    if len(files) + bool(packed) < 2:
        return (options,)
    groups = [packed, *([name] for name in files)] if packed else [[name] for name in files]
    groups[0] += [name for name in names if name in BESIDE_GGUF]
    return tuple(_run(options, group, own_scheme=not packed) for group in groups)


def _run(options: Options, formats: list[str], *, own_scheme: bool) -> Options:
    """One run; it has a folder of its own below the request's, unless its formats have one each."""
    root = Path(options.output.output_dir)
    folder = root / folder_of(formats[0]) if len(formats) == 1 else root
    output = replace(options.output, format=",".join(formats), output_dir=str(folder))
    scheme, given = options.scheme, options.given
    if formats[0].startswith(FORMAT_PREFIX) and not own_scheme:
        scheme = replace(
            SchemeOptions(), layer_config=scheme.layer_config, ignore_layers=scheme.ignore_layers
        )
        given -= {"scheme"}
    return replace(options, output=output, scheme=scheme, given=given)
