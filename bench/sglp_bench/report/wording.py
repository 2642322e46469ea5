"""Numbers as a reader expects them: one place decides digits and units, so cards, tables and pictures agree."""

from __future__ import annotations

import math
from typing import Any

_GAP = "\u00a0"  # a unit never stands on a line of its own
_BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None for anything a picture cannot place (text, None, NaN, a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def significant(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, without an exponent between 1e-4 and 1e6."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 1e-4 or magnitude >= 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(magnitude)))}f}"


def seconds_unit(value_s: float) -> tuple[float, str]:
    """The size in seconds and the name of the unit that suits ``value_s``."""
    return next(((size, name) for size, name in _SECONDS if abs(value_s) >= size), _SECONDS[-1])


def seconds(value_s: float) -> str:
    """A duration given in seconds: ``12.3 ms``."""
    size, name = seconds_unit(value_s)
    return f"{significant(value_s / size)}{_GAP}{name}"


def size_bytes(value: float) -> str:
    """A size given in bytes, in binary units: ``512 MiB``."""
    for size, name in _BYTES:
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:,.0f}{_GAP}{name}" if abs(scaled) >= 100 else f"{significant(scaled)}{_GAP}{name}"
    return f"{value:.0f}{_GAP}B"


def count(value: float) -> str:
    """A count in thousands, millions or billions: ``134.5 M``."""
    for size, name in _COUNTS:
        if abs(value) >= size:
            return f"{significant(value / size, 4)}{_GAP}{name}"
    return f"{value:.0f}"


def ratio(value: float) -> str:
    """A speed ratio: ``1.234×``; three decimals, because intervals of a per cent are what is being discussed."""
    return f"{value:.3f}×" if abs(value) < 10 else f"{value:.2f}×"


def interval(low: float, high: float) -> str:
    """A 95 % interval of a ratio: ``1.201 to 1.267``."""
    return f"{low:.3f} to {high:.3f}"


def percent(fraction: float) -> str:
    """A fraction as per cent: ``94 %``; one decimal below ten."""
    value = 100 * fraction
    return f"{value:.0f}{_GAP}%" if abs(value) >= 10 else f"{value:.1f}{_GAP}%"


def change(before: float, after: float) -> str:
    """Relative change from ``before`` to ``after`` with its sign: ``−18.2 %``."""
    if before == 0:
        return "no base to compare with"
    value = 100 * (after / before - 1)
    if abs(value) < 0.05:
        return "no change"
    return f"{'−' if value < 0 else '+'}{abs(value):.1f}{_GAP}%"


def words(items: list[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
