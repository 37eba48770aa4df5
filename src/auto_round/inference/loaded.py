"""What can be asked of a loaded model beyond running it: a plain model instead, and training of adapters.

Transformers puts such questions to the quantizer that has loaded a model. Its own one for this format answers
neither (`quantizers/quantizer_auto_round.py` in 5.24).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizer_auto_round import AutoRoundQuantizer

from auto_round.inference.grouped_experts import GroupedExperts
from auto_round.inference.qlinear import QuantLinear


class LoadedQuantizer(AutoRoundQuantizer):  # type: ignore[misc]  # Transformers has no types here
    """The quantizer of a model whose layers are ready."""

    @property
    def is_trainable(self) -> bool:
        """True: gradients flow through the layers, so that adapters around them can be trained."""
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` calls: every quantized layer becomes a plain one, in place.

        Args:
            model: the model.
            dtype: of the plain model; None leaves every layer in the dtype in which it computes.

        Returns:
            The model, without a quantization configuration.
        """
        experts = {n: m for n, m in model.named_modules() if isinstance(m, GroupedExperts)}
        for name, module in experts.items():
            model.set_submodule(name, module.dequantize(model))
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                model.set_submodule(name, _plain(layer))
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)


def answer_for(model: Any) -> None:
    """Let a `LoadedQuantizer` answer for a model that Transformers has loaded."""
    old = getattr(model, "hf_quantizer", None)
    if isinstance(old, AutoRoundQuantizer):
        model.hf_quantizer = LoadedQuantizer(old.quantization_config)


def _plain(layer: QuantLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    return plain.train(layer.training)
