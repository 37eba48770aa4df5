"""Whether `vllm serve --quantization humming` runs a folder that vLLM refuses by default.

Humming then reads the whole configuration itself: one scheme for all packed layers (`dynamic` may change it,
`extra_config` is passed over), layers that are stored in 16 bits are left so, the head never is packed.
Source: vLLM `vllm/model_executor/layers/quantization/humming.py`; humming `schema/{gptq,awq,autoround}.py`.
"""

from __future__ import annotations

from auto_round.consumers.fields import CannotReadError, Fields
from auto_round.consumers.folder import Folder
from auto_round.consumers.kernels import needs_groups
from auto_round.consumers.kernels_vllm import needs_humming
from auto_round.consumers.modules import Module, fused_modules
from auto_round.consumers.readers import scheme_by_dynamic
from auto_round.errors import ConfigError
from auto_round.layouts.gptq import GPTQ
from auto_round.layouts.table import layout_of

_METHODS = ("auto-round", "gptq")


def runs_with_humming(folder: Folder) -> bool:
    """Whether that flag runs a folder.

    Zero points that are stored minus one would be read as they are, without an error.
    """
    config = folder.quantization
    if folder.method not in _METHODS or config.get("data_type", "int") != "int" or config.get("desc_act"):
        return False
    try:
        layout = layout_of(config)
        minus_one = isinstance(layout, GPTQ) and layout.minus_one
        return all(_fits(folder, module, minus_one) for module in fused_modules(folder.matrices))
    except (ConfigError, CannotReadError):
        return False


def _fits(folder: Folder, module: Module, minus_one: bool) -> bool:
    packed = [part for part in module.parts if part.packed]
    if not packed:
        return not module.experts
    fields = scheme_by_dynamic(folder, module)
    if module.head or fields is None or len(packed) < len(module.parts):
        return False
    needs_groups(fields)
    needs_humming(module, fields)
    stored = all(
        Fields(part.bits, fields.group_size, fields.sym) == fields
        and part.groups == fields.groups(part.shape[1])
        for part in packed
    )
    return stored and (fields.sym or not minus_one)
