"""Folders of tiny pipelines, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: name of a family -> its folder."""
    from diffusion.tiny import FAMILIES, save

    root, made = tmp_path_factory.mktemp("pipelines"), dict[str, Path]()

    def find(name):
        if name not in made:
            made[name] = save(FAMILIES[name][0], root / name)
        return made[name]

    return find
