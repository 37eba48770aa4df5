"""Pages of mapped files are given back, other memory never."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from auto_round.inference.mapped import MappedFiles

BYTES = 1 << 20
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def resident(path: Path) -> int:
    """KiB of a file that are in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begins = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    rows = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in begins]
    return sum(int(row.split()[1]) for row in rows)


@on_linux
def test_a_tensor_of_a_file_leaves_memory_and_keeps_its_numbers(tmp_path):
    path = tmp_path / "model.safetensors"
    wanted = {n: torch.randint(0, 255, (BYTES,), dtype=torch.uint8) for n in ("first", "second")}
    save_file(wanted, path)
    with safe_open(path, "pt") as file:
        first, second = (file.get_slice(name)[:] for name in ("first", "second"))
    assert torch.equal(first, wanted["first"])
    assert torch.equal(second, wanted["second"])
    before = resident(path)
    given = MappedFiles.now().give_back(first)
    assert 0 < BYTES - given < 8192
    assert before - resident(path) == given >> 10
    assert torch.equal(first, wanted["first"])


@on_linux
def test_memory_that_is_no_file_stays():
    own = torch.arange(BYTES)
    assert MappedFiles.now().give_back(own) == 0
    assert torch.equal(own, torch.arange(BYTES))
    assert MappedFiles.now().give_back(torch.empty(BYTES, device="meta")) == 0


def test_nothing_is_given_back_where_the_system_does_not_say_what_is_mapped():
    assert MappedFiles().give_back(torch.arange(BYTES)) == 0
