"""FP8 products on a GPU: each kind of layer passes its trial, and is then chosen."""

from __future__ import annotations

import dataclasses

import pytest

from accelerator import DEVICE, NEEDED
from auto_round.kernels.check import trial
from auto_round.kernels.select import select_kernel
from auto_round.kernels.table import KERNELS
from kernels.test_scaled_mm import INPUTS, WEIGHTS, layer

pytestmark = NEEDED


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_it_passes_its_trial(weight, inputs):
    kernel, spec = KERNELS["fp8_scaled_mm"].kernel, dataclasses.replace(layer(weight, inputs), device=DEVICE)
    if (refusal := kernel.refuses(spec)) is not None:
        pytest.skip(refusal.reason)
    assert trial(kernel, spec) is None
    assert select_kernel(spec).name == "fp8_scaled_mm"
