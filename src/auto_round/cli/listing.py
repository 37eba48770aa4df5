"""`auto-round list`: formats, schemes, data sets and kernels that there are."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from auto_round.errors import ConfigError, UnsupportedError, nearest

if TYPE_CHECKING:
    from auto_round.facts.layer import Role


def listing(topics: Sequence[str]) -> str:
    """Return the lists of some topics; of all without topics; for `--help` what there is to list.

    Raises:
        ConfigError: an unknown topic.
    """
    if not {"-h", "--help"}.isdisjoint(topics):
        words = " | ".join(TOPICS)
        return f"usage: auto-round list [{words}] ...\n\nSay what there is; all of it without a word."
    wanted = [_topic(name) for name in topics] or list(TOPICS)
    return "\n\n".join(f"{name}s:\n{TOPICS[name]()}" for name in dict.fromkeys(wanted))


_LEGEND: Final = """
  W4: weights of 4 bits. g128: in groups of 128 that share a scale. sym: no zero points. A8: inputs of layers
  are rounded to 8 bits. mx_fp, nv_fp, fp: floating numbers; else whole ones. A name alone (Q4_K): the type
  of most tensors of a GGUF file."""


def _topic(name: str) -> str:
    singular = name.casefold().removesuffix("s")
    if singular in TOPICS:
        return singular
    raise ConfigError(f'nothing to list under "{name}": {nearest(name, TOPICS)}')


def _formats() -> str:
    from auto_round.export.table import LATER, describe_formats

    rows = {name: ", ".join(presets) for name, presets in describe_formats().items()}
    return _table({**rows, "(not there yet)": ", ".join(LATER)})


def _schemes() -> str:
    from auto_round.schemes import PRESET_SCHEMES
    from auto_round.schemes.vocabulary import MIXED_PRESETS

    now, later = {}, []
    for name, scheme in PRESET_SCHEMES.items():
        try:
            scheme.weight_format()
        except UnsupportedError:
            later.append(name)
        else:
            now[name] = "; ".join([scheme.label, *_exceptions(MIXED_PRESETS.get(scheme.recipe or "", {}))])
    table = _table({**now, **({"(not there yet)": ", ".join(later)} if later else {})})
    return f"{table}\n{_LEGEND}"


def _exceptions(mixed: Mapping[Role, Mapping[str, Any]]) -> list[str]:
    """What some roles have instead, where a preset is of several schemes."""
    fields: dict[str, list[str]] = {}
    for role, changes in mixed.items():
        said = ", ".join(f"{name} {value}" for name, value in changes.items())
        fields.setdefault(said, []).append(role.value)
    return [f"{said} for {', '.join(roles)}" for said, roles in fields.items()]


def _datasets() -> str:
    from auto_round.calibration.registry import (
        HUB_DATASETS,
        LATER_DATASETS,
        LLAVA_FILES,
        PYTHON_DOCS,
        SELF,
    )
    from auto_round.diffusion.captions import COCO

    rows = {PYTHON_DOCS: "the documentation inside this Python; needs no network"}
    rows |= {SELF: "text that the model writes itself; needs no network"}
    rows |= {d.names[0]: f"split {'+'.join(d.splits)}, {' + '.join(d.fields)}" for d in HUB_DATASETS}
    rows |= {", ".join(LLAVA_FILES): "with images, which lie in --extra_data_dir"}
    rows |= {COCO: "captions, for pipelines of diffusers; also a .tsv, .jsonl, .json or .txt file of them"}
    later = ", ".join(name for name in LATER_DATASETS if name != COCO)
    rows |= {"path.jsonl": "also .json, .txt and .parquet", "(not there yet)": later}
    return _table(rows)


def _backends() -> str:
    from auto_round.kernels.select import describe_kernels
    from auto_round.kernels.table import ABSENT, STAND_INS

    rows = describe_kernels()
    names: dict[tuple[str, str], list[str]] = {}
    for name, instead in STAND_INS.items():
        names.setdefault((", ".join(instead.names), instead.reason), []).append(name)
    others = "\n".join(
        textwrap.fill(
            f"{', '.join(own)}: {reason}; taken instead: {taken}",
            110,
            initial_indent="  ",
            subsequent_indent="      ",
            break_on_hyphens=False,
        )
        for (taken, reason), own in names.items()
    )
    table = _table({**rows, "(not there)": ", ".join(ABSENT)})
    return f"{table}\n\nnames of others' kernels, which are understood:\n{others}"


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 4
    wrapped = (
        textwrap.fill(text, 110, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
        for name, text in rows.items()
    )
    return "\n".join(wrapped)


TOPICS: Final[Mapping[str, Callable[[], str]]] = MappingProxyType(
    {"format": _formats, "scheme": _schemes, "dataset": _datasets, "backend": _backends}
)
