"""Where a value lies on an axis, and which round numbers stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sglp_bench.report.charts.drawing import Drawing


@dataclass(frozen=True)
class Scale:
    """Places values on an axis: ``low`` lies at ``start`` and ``high`` at ``end``, in pixels of the drawing.

    A value above ``high`` is placed at ``end``.  With ``log`` equal ratios are equally far apart; ``low`` is then above
    zero.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of ``value``."""
        value = min(value, self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers on this axis, about ``wanted`` of them unless it is logarithmic."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, wanted)


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high], about ``wanted`` of them."""
    span = high - low
    if not 0 < span < math.inf:
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


def upright_axis(drawing: Drawing, y_of: Scale, ticks: Iterable[float], left: float) -> None:
    """Grid lines from ``left`` to the right edge, each with its number in the margin."""
    for tick in ticks:
        drawing.line(left, y_of(tick), drawing.width, y_of(tick), "grid")
        drawing.text(left - 6, y_of(tick) + 4, f"{tick:.6g}", anchor="end")
