"""Formats amounts with units, decimal throughout: 1 GB is 10^9 bytes."""

from __future__ import annotations


def size(value: float) -> str:
    """Formats bytes."""
    scale, name = _unit(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")))
    return f"{value / scale:.2f} {name}"


def work(value: float) -> str:
    """Formats floating-point operations."""
    scale, name = _unit(value, ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")))
    return f"{value / scale:.4g} {name}"


def duration(seconds: float) -> str:
    """Formats a duration."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for limit, length, name in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / length:.3g} {name}"
    return f"{seconds / 86400:,.3g} days"


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """The largest unit that the value reaches, else the smallest."""
    return next((unit for unit in units if value >= unit[0]), units[-1])
