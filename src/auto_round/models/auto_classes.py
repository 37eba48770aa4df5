"""Which class of Transformers builds a model: the one place that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CAUSAL_LM = "AutoModelForCausalLM"
AUTO_CLASSES = ("AutoModelForImageTextToText", CAUSAL_LM, "AutoModelForMultimodalLM")
"""Tried in this order: the first that knows a configuration builds and loads its model.

Some configurations with images are known to the causal class too, which builds the part that reads text.
"""


def auto_class_name(config: Any) -> str:
    """Name of the first of `AUTO_CLASSES` that knows a configuration; the causal one where none does.

    Args:
        config: of Transformers, or made by code in the model's folder.
    """
    import transformers

    own_code = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        known = getattr(transformers, name, None)  # the last came after Transformers 5.0
        if name in own_code or (known is not None and type(config) in known._model_mapping):
            return name
    return CAUSAL_LM


def auto_class(name: str) -> Any:
    """The class of that name."""
    import transformers

    return getattr(transformers, name)


def load_model(folder: Path, *, trust_remote_code: bool, **settings: Any) -> Any:
    """What `from_pretrained` of the folder's auto class gives.

    Args:
        folder: a model folder, quantized or not.
        trust_remote_code: run model code that lies in it.
        **settings: further arguments of `from_pretrained`.

    Raises:
        Exception: whatever Transformers raises.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    made: Any = auto_class(auto_class_name(config))
    return made.from_pretrained(folder, trust_remote_code=trust_remote_code, **settings)
