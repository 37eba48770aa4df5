"""Where the command line puts a model: a folder that says what is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from auto_round.config import Options
from auto_round.schemes import QuantizationScheme, parse_scheme
from auto_round.schemes.vocabulary import KEPT_BITS


def with_named_folder(options: Options) -> Options:
    """Return the options with `output_dir/NAME` as output folder.

    Raises:
        ConfigError: the scheme is unknown.
    """
    from auto_round.export.table import plans_alone

    scheme = parse_scheme(options.scheme.scheme, options.scheme.overrides())
    first = options.output.formats[0]
    kind = first.partition(":")[0] if plans_alone(first) else ""
    if options.auto.asked:
        kind = "auto" if len(options.auto.avg_bits) != 1 else f"auto-{options.auto.avg_bits[0]:g}bits"
    name = folder_name(options.model.model, scheme, kind)
    folder = Path(options.output.output_dir) / name
    return replace(options, output=replace(options.output, output_dir=str(folder)))


def folder_name(model: str, scheme: QuantizationScheme, kind: str = "") -> str:
    """Return `Qwen3-0.6B-w4g128` and the like; `w4a16` where groups have no size, or weights are kept.

    Args:
        model: folder or hub name.
        scheme: scheme of the run.
        kind: word for a format that plans for itself (`Qwen3-0.6B-gguf`); empty for the scheme's.
    """
    path = Path(model).expanduser()
    base = path.resolve().name if path.is_dir() else model.rstrip("/").rpartition("/")[2]
    if kind:
        return f"{base}-{kind}"
    if scheme.group_size > 0 and scheme.quantized:
        return f"{base}-w{scheme.bits}g{scheme.group_size}"
    floating = "fp" if (scheme.act_data_type or "").startswith("fp") else ""
    return f"{base}-w{scheme.bits}a{floating}{scheme.act_bits or KEPT_BITS}"
