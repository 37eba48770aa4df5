"""Verdicts as a report holds them, and in a few words for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.checkpoint.header import read_object
from auto_round.consumers.folder import CONFIG
from auto_round.consumers.verdict import judge_folder
from auto_round.errors import CheckpointError
from auto_round.log import logger

Verdicts = Mapping[str, Mapping[str, Any]]
"""Engine -> `Verdict.to_dict`."""


def judge_outputs(folders: Mapping[str, Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Output format -> verdicts on its folder.

    Folders that look unquantized and single files are left out; so is, with a warning, a folder whose tensors
    are packed in a way that is not known here: it is written and whole all the same.

    Args:
        folders: output format -> finished folder.
    """
    found = {}
    for name, folder in folders.items():
        if not (folder / CONFIG).is_file() or "quantization_config" not in read_object(folder / CONFIG):
            continue
        try:
            found[name] = {verdict.engine: verdict.to_dict() for verdict in judge_folder(folder)}
        except CheckpointError as error:
            logger.warning("which engines load the format %s is not known: %s", name, error)
    return found


def loading(verdicts: Verdicts) -> str:
    """Engines that load a folder, with their kernels, for example `Transformers, vLLM (Marlin)`."""
    return ", ".join(
        f"{engine} ({', '.join(found['kernels'])})" if found.get("kernels") else engine
        for engine, found in verdicts.items()
        if found["loads"]
    )


def refusing(verdicts: Verdicts) -> dict[str, str]:
    """Engines that do not load a folder -> why not."""
    return {engine: "; ".join(found["reasons"]) for engine, found in verdicts.items() if not found["loads"]}
