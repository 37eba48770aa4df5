"""The importances that a run measures, as a file of llama.cpp: what can be refused early, and the writing."""

from __future__ import annotations

from pathlib import Path

from auto_round.checkpoint.disk import writing
from auto_round.config.options import Options
from auto_round.errors import CheckpointError, ConfigError
from auto_round.export.exporter import Inputs
from auto_round.export.gguf.imatrix import Importances, read_imatrix, write_imatrix
from auto_round.export.gguf.model import GgufModel
from auto_round.log import logger


def check_save_imatrix(options: Options, output: Path, *, calibrated: bool) -> None:
    """Refuse `save_imatrix` before any work where there will be nothing to write, or no place for it.

    Args:
        options: what the user asked for.
        output: folder of the result.
        calibrated: calibration rows will run through the model.

    Raises:
        ConfigError: nothing is calibrated, or something else lies under the file's name.
    """
    wanted = options.output.save_imatrix
    if wanted is None:
        return
    if not calibrated:
        raise ConfigError(
            "save_imatrix writes what calibration data shows, but this run rounds plainly and reads none: "
            "give --enable_opt_rtn or --iters 200 too, or leave it out"
        )
    path = Path(wanted).expanduser().resolve()
    if path == output.expanduser().resolve() or path.is_dir():
        raise ConfigError(f"save_imatrix {wanted} is a folder: name a file, for example imatrix.gguf")
    if path.exists():
        try:
            read_imatrix(path)
        except CheckpointError as error:
            raise ConfigError(
                f"save_imatrix {wanted}: something else lies there ({error}); choose another name"
            ) from error


def save_imatrix(options: Options, model: GgufModel, inputs: Inputs, output: Path, folder: Path) -> None:
    """Write the file that the user asked for, if any; it appears complete or not at all.

    Args:
        options: what the user asked for.
        model: names of the file's tensors.
        inputs: what flowed into the layers.
        output: folder of the result.
        folder: folder that will become the output; a file inside the output is written there.

    Raises:
        ConfigError: disk full, no permission.
    """
    wanted = options.output.save_imatrix
    if wanted is None:
        return
    found = Importances.of_sources(model, inputs, (options.said_dataset,))
    path, output = Path(wanted).expanduser().resolve(), output.expanduser().resolve()
    place = folder / path.relative_to(output) if path.is_relative_to(output) else path
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(place, found)
    logger.info("importances of %d tensors: %s", len(found.rows), path)
