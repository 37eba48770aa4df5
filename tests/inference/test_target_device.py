"""Which kind of device a device map stands for."""

from __future__ import annotations

import pytest
import torch

from auto_round.inference.convert_model import infer_target_device

BEST = torch.accelerator.current_accelerator(check_available=True)


@pytest.mark.parametrize(
    ("device_map", "kind"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("cuda:1", "cuda"),
        (torch.device("xpu", 0), "xpu"),
        ({"": "cpu"}, "cpu"),
        ({"a": "disk", "b": "cpu", "c": "cuda:0"}, "cuda"),
        ({"a": torch.device("cpu"), "b": "disk"}, "cpu"),
        ("auto", BEST.type if BEST else "cpu"),
        (0, BEST.type if BEST else "cpu"),
        ({"": 0}, BEST.type if BEST else "cpu"),
    ],
)
def test_kinds(device_map, kind):
    assert infer_target_device(device_map) == kind
