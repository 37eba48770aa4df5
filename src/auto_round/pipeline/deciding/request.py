"""First step of a job: what is asked for, with everything refused that needs neither model nor network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.sources import check_named
from auto_round.calibration.template import template_text
from auto_round.checkpoint.disk import refuse_place
from auto_round.config.options import Options
from auto_round.errors import ConfigError
from auto_round.export.exporter import Exporter
from auto_round.export.table import settle_formats
from auto_round.pipeline.deciding.caches import refuse_formats
from auto_round.pipeline.deciding.image_rows import image_folder
from auto_round.pipeline.machine.device import Devices, choose_devices
from auto_round.pipeline.machine.threads import warn_of_threads
from auto_round.report.draw import require_plotting
from auto_round.schemes.scheme import parse_scheme
from auto_round.tuning.settings import tune_settings

LEAST_BITS = 2


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        options: the user's, in line with what the formats imply.
        formats: the formats as asked for.
        devices: where blocks are tuned.
        output: folder of the result.
    """

    options: Options
    formats: tuple[Exporter, ...]
    devices: Devices
    output: Path

    @property
    def device(self) -> torch.device:
        """The main device."""
        return self.devices.main


def make_request(options: Options, *, dataset: Any = None, output: Path | None = None) -> Request:
    """Settle the formats and the device, and refuse what can be known to be wrong before anything is fetched.

    Args:
        options: what the user asked for.
        dataset: calibration data as Python objects; None for the data sets that `options` name.
        output: final folder; None for `options.output.output_dir`.

    Raises:
        ConfigError: a scheme, format, step size, data set or output folder that cannot be, or no such file.
        UnsupportedError: a scheme or format that is not there yet.
    """
    if options.output.report:
        require_plotting()
    devices = choose_devices(options.model.device_map)
    warn_of_threads(devices.main)
    options, formats = settle_formats(options)
    refuse_formats(options.cache, formats)
    scheme = parse_scheme(options.scheme.scheme, options.scheme.overrides())
    scheme.weight_format()
    scheme.activation_format()
    for key, value in (options.scheme.layer_config or {}).items():
        try:
            parse_scheme(value, base=scheme)
        except ConfigError as error:
            raise ConfigError(f'layer_config "{key}": {error}') from error
    tune_settings(options.tune, LEAST_BITS)
    template_text(options.calibration.template)
    if options.calibration.extra_data_dir is not None:
        image_folder(options.calibration.extra_data_dir)
    if dataset is None:
        check_named(options.calibration.dataset)
    where = output or Path(options.output.output_dir)
    refuse_place(where)
    return Request(options, formats, devices, where)
