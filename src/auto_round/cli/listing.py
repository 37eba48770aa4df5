"""`auto-round list`: formats, schemes, data sets and kernels that there are."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from auto_round.errors import ConfigError, UnsupportedError, nearest


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

    now, later = {}, []
    for name, scheme in PRESET_SCHEMES.items():
        try:
            scheme.weight_format()
        except UnsupportedError:
            later.append(name)
        else:
            now[name] = scheme.label
    return _table({**now, **({"(not there yet)": ", ".join(later)} if later else {})})


def _datasets() -> str:
    from auto_round.calibration.registry import HUB_DATASETS, LATER_DATASETS, LLAVA_FILES, PYTHON_DOCS

    rows = {PYTHON_DOCS: "the documentation inside this Python; needs no network"}
    rows |= {d.names[0]: f"split {'+'.join(d.splits)}, {' + '.join(d.fields)}" for d in HUB_DATASETS}
    rows |= {", ".join(LLAVA_FILES): "with images, which lie in --extra_data_dir"}
    rows |= {"path.jsonl": "also .json, .txt and .parquet", "(not there yet)": ", ".join(LATER_DATASETS)}
    return _table(rows)


def _backends() -> str:
    from auto_round.kernels.select import describe_kernels
    from auto_round.kernels.table import ABSENT, STAND_INS

    rows = describe_kernels()
    rows |= {name: f"stands for {', '.join(s.names)}: {s.reason}" for name, s in STAND_INS.items()}
    return _table({**rows, "(not there)": ", ".join(ABSENT)})


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
