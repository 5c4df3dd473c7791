"""Numbers and errors for people."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def quantity(value: float, unit: str) -> str:
    """Three significant digits, a decimal prefix and the unit: (12345, 'B') -> '12.3 kB'."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """'1d 02h', '3h 05m', '4m 09s' or '12s'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{h}h {m:02d}m"
    return f"{m}m {s:02d}s" if minutes else f"{s}s"


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing, as MemoryError does."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
