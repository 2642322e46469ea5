"""Where the round numbers of an axis lie."""

from __future__ import annotations

import math


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high], about ``wanted`` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high]; with twos and fives while these are few, every n-th when they are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    stride = 1 + (last - first) // 7
    ticks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
