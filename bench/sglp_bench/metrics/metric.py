"""What a metric is: one object says its name, what it means, how it is read and what a report may say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_bench.devices.memory import MemoryReading


@dataclass(frozen=True)
class TimeMetric:
    """A number derived from the raw times of one block.

    Attributes:
        name: With its unit; its key in every file.
        label: What a reader calls it.
        unit: What stands beside the label.
        formula: As printed in reports; the value of a block is the median of this over its iterations.
        higher_is_better: Throughput, as opposed to latency.
        series: The raw samples it is read from; a workload that records them yields this metric.
        iterations: Samples of a block and workload to one value per iteration, shape (iterations,).
        raw: Samples of a block to the times percentiles are taken over, or None where percentiles are not reported.
        claimed: Whether a report may claim it.
        card: Heading of its card in a report, or None when it has no card.
        place: Where its row and its card stand in a report, lowest first.
    """

    name: str
    label: str
    unit: str
    formula: str
    higher_is_better: bool
    series: str
    iterations: Callable[[Any, Any], NDArray[np.float64]]  # each metric names the fields it reads of the two
    raw: Callable[[Any], NDArray[np.float64]] | None = None
    claimed: bool = False
    card: str | None = None
    place: int = 1000


@dataclass(frozen=True)
class MemoryMetric:
    """A number of bytes of one arm; less is better.

    Attributes:
        name: With its unit; its key in every file.
        label: What a reader calls it.
        unit: Empty: a size is printed with its unit.
        formula: As printed in reports, with the probe behind it.
        read: An arm's artifact facts and memory ladder to the reading; its ``bytes`` are None when there is none.
        measured: Whether a second process may read another value, so that the A/A control says something.
        device_only: Whether it exists on graphics cards only; its absence elsewhere is not worth a note.
        higher_is_better: False.
        claimed: False: bytes have no interval.
        card: None: a report's memory cards are of rungs of the ladder.
        place: Where its row stands in a report, lowest first.
    """

    name: str
    label: str
    unit: str
    formula: str
    read: Callable[[Mapping[str, Any], Mapping[str, MemoryReading]], MemoryReading]
    measured: bool = True
    device_only: bool = False
    higher_is_better: bool = False
    claimed: bool = False
    card: str | None = None
    place: int = 1000


Metric = TimeMetric | MemoryMetric
