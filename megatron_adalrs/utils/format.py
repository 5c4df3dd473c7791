"""Numbers, durations and errors as text."""

from __future__ import annotations

import math

NOTHING = "–"
"""Stands where there is no value."""
_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def count(value: float) -> str:
    """Return a whole number with thousands separators: 12345 -> '12,345'."""
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """Return a percentage with one decimal: (1, 8) -> '12.5%'."""
    return f"{part / whole:.1%}" if whole else NOTHING


def quantity(value: float, unit: str = "") -> str:
    """Return three significant digits, a decimal prefix and the unit: (12345, 'B') -> '12.3 kB'."""
    if not math.isfinite(value):
        return NOTHING
    rounded = float(f"{value:.3g}")
    for prefix, factor in _PREFIXES:
        if abs(rounded) >= factor:
            return f"{rounded / factor:.3g} {prefix}{unit}".strip()
    return f"{rounded:.3g} {unit}".strip()


def scientific(value: float) -> str:
    """Return three significant digits and an exponent without padding: 0.000675 -> '6.75e-4'."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Return a time as '1d 02h', '3h 05m', '4m 09s', '12s' or '0.26s'."""
    minutes, s = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.2g}s" if seconds < 10 else f"{s}s"
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    return f"{h}h {m:02d}m" if hours else f"{m}m {s:02d}s"


def clock(seconds: float) -> str:
    """Return a time as on a clock: '0:09', '12:03', '1:20:11' or '2d 03:10:11'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}:{m:02d}:{s:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def velocity(value: float | None, error: float | None) -> str:
    """Return a loss descent velocity in nats per step with its standard error: '0.0142 ± 0.0004'."""
    if value is None or not math.isfinite(value):
        return NOTHING
    spread = "" if error is None or not math.isfinite(error) else f" ± {error:.2g}"
    return f"{value:.4g}{spread}"


def gain(value: float, error: float | None) -> str:
    """Return a difference of losses with its standard error: '+0.01234 ± 0.001'."""
    return f"{value:+.4g}" if error is None else f"{value:+.4g} ± {error:.2g}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
