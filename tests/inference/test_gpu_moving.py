"""`model.to("cuda")` after loading, and back."""

from __future__ import annotations

import pytest
import torch

from accelerator import DEVICE, NEEDED, needs_cuda
from inference.test_moving import loaded

pytestmark = NEEDED


@needs_cuda  # in a rehearsal nothing would move
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_to_a_gpu_and_back(backend):
    layer, q = loaded("auto")
    layer.backend = backend
    layer.to(DEVICE)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    want = x.double() @ q.format.dequantize(q).double().t() + layer.bias.cpu().double()
    assert (layer(x.to(DEVICE)).cpu().double() - want).abs().max() < 0.02 * want.abs().max()
    layer.backend = "auto"
    assert torch.equal(layer.to("cpu").restore().weight.codes, q.codes)
