"""The last words of a run: what was written, how small it is, and what it costs in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from auto_round.cli.units import duration, size
from auto_round.consumers.lines import loading, refusing

if TYPE_CHECKING:
    from auto_round.pipeline.result import Result


def summary(result: Result) -> str:
    """Say in a few lines what a run gave; what was not measured is left out."""
    return "\n".join(f"{name:<12}{text}" for name, text in _lines(result))


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    report = result.report
    sizes: Mapping[str, int] = report["bytes_after"]
    for folder, after in zip(result.folders, sizes.values(), strict=True):
        yield "written", str(folder)
        times = report["bytes_before"] / after
        yield "size", f"{size(report['bytes_before'])} -> {size(after)} ({times:.2f} times smaller)"
    yield from _quality(report)
    for name, checked in report.get("verified", {}).items():
        if "skipped" in checked:
            yield "reloaded", f"{name}: no, {checked['skipped']}"
            continue
        if "file" in checked:
            yield "read back", f"{checked['file']}: {checked['tensors']} tensors, by {checked['reader']}"
            continue
        yield "reloaded", f"{name}: KL {checked['kl']:.2g} from the model as tuned"
        if checked["sample"]:
            yield "it writes", repr(checked["sample"])
    for name, verdicts in report.get("engines", {}).items():
        yield "loads in", f"{loading(verdicts)} ({name})" if len(report["engines"]) > 1 else loading(verdicts)
        yield from (("not in", f"{engine}: {reason}") for engine, reason in refusing(verdicts).items())
    yield "took", f"{duration(result.seconds)}, peak memory {size(result.peak_bytes)}"


def _quality(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    held_out = report.get("held_out")
    if held_out is None:
        yield "quality", "not measured: no calibration data was asked for"
        return
    before, after = held_out["perplexity_before"], held_out["perplexity_after"]
    yield "perplexity", f"{before:.4g} -> {after:.4g} ({100 * (after / before - 1):+.2f} %) on held-out rows"
    yield "KL", f"{held_out['kl']:.4g} nats per token from the original's predictions"
