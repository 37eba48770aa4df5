"""What can be known to be wrong before a model or data are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auto_round.calibration.sources import check_named
from auto_round.checkpoint.disk import refuse_place
from auto_round.config.options import Options
from auto_round.errors import ConfigError, MissingError
from auto_round.export.table import parse_formats
from auto_round.pipeline.settings import tune_settings
from auto_round.schemes.scheme import parse_scheme

LEAST_BITS = 2


def refuse_early(options: Options, *, dataset: Any, output: Path, gguf: bool) -> None:
    """Look at everything that needs neither the model nor a network.

    Args:
        options: what the user asked for.
        dataset: calibration data as Python objects; None for the data sets that `options` name.
        output: final folder.
        gguf: the formats name a GGUF file, which has rules of its own.

    Raises:
        ConfigError: a scheme, format, step size, data set or output folder that cannot be, or no such file.
        UnsupportedError: a scheme or format that is not there yet.
    """
    scheme = parse_scheme(options.scheme.scheme, options.scheme.overrides())
    scheme.weight_format()
    scheme.activation_format()
    for key, value in (options.scheme.layer_config or {}).items():
        try:
            parse_scheme(value, base=scheme)
        except ConfigError as error:
            raise ConfigError(f'layer_config "{key}": {error}') from error
    if not gguf:
        parse_formats(",".join(options.output.formats))
    tune_settings(options.tune, LEAST_BITS)
    if dataset is None:
        check_named(options.calibration.dataset)
    files = {"imatrix": options.calibration.imatrix, "gguf_template": options.output.gguf_template}
    for name, value in files.items():
        if value is not None and not Path(value).expanduser().is_file():
            raise MissingError(f"{name} {value}: no such file; relative paths begin at {Path.cwd()}")
    refuse_place(output)
