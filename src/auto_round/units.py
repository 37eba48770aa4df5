"""Numbers as people read them: bytes, seconds, losses."""

from __future__ import annotations


def size(count: float) -> str:
    """Write a number of bytes with a unit, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Write seconds as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rough_duration(seconds: float) -> str:
    """Write estimated seconds as `42 s`, `12 min` or `2.1 h`: no more digits than an estimate has."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def gain(before: float, after: float) -> str:
    """Write `0.0123 -> 0.0101 (-18 %)`."""
    change = f" ({100 * (after - before) / before:+.0f} %)" if before > 0 else ""
    return f"{before:.4g} -> {after:.4g}{change}"


def shrinkage(before: float, after: float) -> str:
    """Write `2.91 times smaller`, or `1.02 times as large` of what did not shrink.

    Args:
        before: bytes.
        after: bytes.
    """
    return f"{before / after:.2f} times smaller" if after < before else f"{after / before:.2f} times as large"
