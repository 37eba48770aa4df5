"""What scripts read of an `AutoRound`: arguments by name, the scheme in force, the model, the tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from auto_round.config import GROUPS, Options, argument_names, settings
from auto_round.schemes import PRESET_SCHEMES, Plan, QuantizationScheme, parse_scheme
from auto_round.schemes.vocabulary import KEPT_BITS

if TYPE_CHECKING:
    from torch import nn

SCHEME_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(QuantizationScheme))
"""Names that tell the scheme in force, whatever was given under them."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a run leaves for who reads attributes.

    Attributes:
        plan: what became of every layer.
        folder: of the quantized model; None where only files for llama.cpp were written.
    """

    plan: Plan
    folder: Path | None


class Attributes:
    """Read access to a quantizer: what was asked for before a run, what is in force after it."""

    options: Options
    _model: Any
    _tokenizer: Any
    _done: Done | None = None
    _seen: weakref.ref[nn.Module] | None = None

    def __getattr__(self, name: str) -> Any:
        """Read an argument by its name."""
        if name.startswith("_") or name not in _readable():
            raise AttributeError(f"'{type(self).__name__}' object has no attribute {name!r}")
        if name in SCHEME_FIELDS:
            value = getattr(self._scheme(), name)
            return KEPT_BITS if name == "act_bits" and value is None else value
        group, option = _readable()[name]
        return self.options.typed.get(option, getattr(getattr(self.options, group), option))

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change an argument after the fact: it would have no effect."""
        if name in _readable():
            raise AttributeError(f"{name} is decided when the object is made: give it there as an argument")
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Names of attributes, arguments included."""
        return sorted({*super().__dir__(), *_readable()})

    @property
    def layer_config(self) -> dict[str, Any]:
        """Scheme of every layer by name after a run; the rules that were given before it."""
        if self._done is None:
            return dict(self.options.scheme.layer_config or {})
        return layer_schemes(self._done.plan, kept=True)

    @property
    def model(self) -> Any:
        """The quantized model after a run, the original before it; read from disk where nobody holds it.

        None after a run that wrote nothing but GGUF files.
        """
        held = None if self._seen is None else self._seen()
        if held is not None:
            return held
        if self._done is not None:
            return None if self._done.folder is None else self._remember(self._read(self._done.folder))
        return self._model if self._model is not None else self._remember(self._original())

    def _result_of(self, done: Done) -> Any:
        """The quantized model of a run, the last one or an earlier one."""
        if done is self._done:
            return self.model
        return None if done.folder is None else self._read(done.folder)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as it was given, else that of the model's folder; None of a model in memory."""
        if self._tokenizer is not None or (self._model is not None and self.options.model.tokenizer is None):
            return self._tokenizer
        from transformers import AutoTokenizer

        named = self.options.model
        where = named.tokenizer or self._source_folder()
        return AutoTokenizer.from_pretrained(where, trust_remote_code=named.trust_remote_code)

    def _scheme(self) -> QuantizationScheme:
        asked = self.options.scheme
        if self._done is not None:
            return self._done.plan.scheme
        return parse_scheme(asked.scheme, asked.overrides())

    def _remember(self, model: Any) -> Any:
        """The same model, which `model` gives again while somebody holds it."""
        self._seen = weakref.ref(model)
        return model

    def _source_folder(self) -> Path:
        from auto_round.models.hub import resolve_model

        return Path(resolve_model(self.options.model.model, platform=self.options.model.platform))

    def _original(self) -> Any:
        from auto_round.models.auto_classes import load_model

        trust = self.options.model.trust_remote_code
        return load_model(self._source_folder(), dtype="auto", trust_remote_code=trust)

    def _read(self, folder: Path) -> Any:
        """Read a quantized model with Transformers and, of GPTQ and AWQ folders too, with this package."""
        from transformers import AutoRoundConfig

        from auto_round.export.hf_config import read_config
        from auto_round.models.auto_classes import load_model

        method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
        own = {"quantization_config": AutoRoundConfig()} if method in ("gptq", "awq") else {}
        trust = self.options.model.trust_remote_code
        with warnings.catch_warnings():
            # Transformers warns that only the backend of what is passed will be used: that is what is meant.
            warnings.simplefilter("ignore", UserWarning)
            return load_model(folder, dtype="auto", trust_remote_code=trust, **own)


@cache
def _readable() -> Mapping[str, tuple[str, str]]:
    """Every argument that can be read -> group and name of its option; opposites (`disable_amp`) cannot."""
    groups = {setting.name: key for key, group in GROUPS.items() for setting in settings(group)}
    own = {"model", "tokenizer", "layer_config"}  # properties
    names = {name: setting.name for name, (setting, opposite) in argument_names().items() if not opposite}
    found = {name: (groups[option], option) for name, option in names.items() if name not in own}
    return MappingProxyType(found | dict.fromkeys(SCHEME_FIELDS, ("scheme", "")))


def layer_schemes(plan: Plan, *, kept: bool = False) -> dict[str, dict[str, Any]]:
    """Scheme of every layer by name; those of 16 bits only where `kept` is asked for."""
    plain = PRESET_SCHEMES["BF16"]
    schemes = {name: entry.scheme for name, entry in plan.entries.items()}
    return {
        name: (plain if scheme is None else scheme).to_dict()
        for name, scheme in schemes.items()
        if kept or scheme is not None
    }
