"""Scores on disk: what was measured once is not measured again, and a killed measurement goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_round.autoscheme.parts import Part
from auto_round.checkpoint.journal import Journal
from auto_round.errors import ConfigError
from auto_round.schemes.plan import Plan


@dataclass(frozen=True, slots=True)
class KeptScores:
    """Scores of one model on one set of rows.

    Attributes:
        journal: the file.
        scratch: folder for what a measurement needs while it runs.
    """

    journal: Journal
    scratch: Path

    def find(self, part: Part, plans: Sequence[Plan]) -> list[float] | None:
        """Score of a part for each option; None where one of them was not measured."""
        found = [self._known().get(_key(part, plan)) for plan in plans]
        return None if None in found else [score for score in found if score is not None]

    def keep(self, part: Part, plans: Sequence[Plan], scores: Sequence[float]) -> None:
        """Write the scores of a part down."""
        named = {_key(part, plan): score for plan, score in zip(plans, scores, strict=True)}
        self.journal.append({"layers": f"{part.layers[0]} ... {part.layers[-1]}", "scores": named})

    def finish(self) -> None:
        """Remove what only an unfinished measurement needs."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _known(self) -> dict[str, float]:
        return {key: score for entry in self.journal.entries for key, score in entry["scores"].items()}


@contextmanager
def open_scores(root: Path, signature: Mapping[str, Any]) -> Iterator[KeptScores]:
    """Open the scores that were measured under the same circumstances.

    Args:
        root: folder of all scores.
        signature: model, rows and method, as JSON values.

    Raises:
        ConfigError: the folder cannot be made.
    """
    digest = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()[:24]
    folder = root / digest
    scratch = folder / "scratch"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"sensitivities are kept in {root}, and it cannot be written ({error.strerror}): name another "
            "folder for caches with AR_CACHE"
        ) from error
    with Journal.open(folder / "scores.jsonl", signature) as journal:
        yield KeptScores(journal, scratch)


def _key(part: Part, plan: Plan) -> str:
    """What a score belongs to: layers, and the scheme of each."""
    schemes = [None if (s := plan.scheme_of(name)) is None else s.to_dict() for name in part.layers]
    text = json.dumps([list(part.layers), schemes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
