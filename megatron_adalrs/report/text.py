"""Numbers as people read them."""

from __future__ import annotations

import math

NOTHING = "–"


def count(value: float) -> str:
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else NOTHING


def quantity(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.23 M, 45.6 GB."""
    if not math.isfinite(value):
        return NOTHING
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            scaled = value / factor
            digits = max(0, 2 - math.floor(math.log10(abs(scaled))))
            return f"{scaled:.{digits}f} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()


def scientific(value: float) -> str:
    """A learning rate: 6.75e-4."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def velocity(value: float | None, error: float | None) -> str:
    """A velocity with twice its standard error, per 1000 steps."""
    if value is None or not math.isfinite(value):
        return NOTHING
    spread = "" if error is None or not math.isfinite(error) else f" ± {2e3 * error:.3g}"
    return f"{1e3 * value:.3g}{spread}"


def gain(value: float, error: float | None) -> str:
    """A difference of losses with twice its standard error, in nats."""
    return f"{value:+.4g}" if error is None else f"{value:+.4g} ± {2 * error:.2g}"
