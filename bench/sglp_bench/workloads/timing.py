"""What every timed block needs of a clock: steadiness, a quiet garbage collector, and a reading around a call."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from sglp_bench.workloads.protocol import Clock
from sglp_deploy.protocols import Runner

WARM_UP_WINDOW = 4
WARM_UP_TOLERANCE = 0.05  # the rule TensorRT Model Connect uses: halves of the window within 5 %


def is_flat(samples: Sequence[float], *, window: int = WARM_UP_WINDOW, tolerance: float = WARM_UP_TOLERANCE) -> bool:
    """Whether the medians of the two halves of the last ``window`` samples differ by at most ``tolerance``."""
    if len(samples) < window:
        return False
    recent = np.asarray(samples[-window:])
    first, second = float(np.median(recent[: window // 2])), float(np.median(recent[window // 2 :]))
    return abs(second - first) <= tolerance * first


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection but those the block asks for: one in the middle of a sample lands in one arm by chance."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()  # the loaded model is not walked again by the collections between iterations
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def seconds(runner: Runner, call: Callable[[], object], clock: Clock) -> float:
    """The time of ``call`` and of all the work it asked ``runner`` for.

    From ``clock()`` to ``synchronize(); clock()``; the runner has been synchronized before.
    """
    start = clock()
    call()
    runner.synchronize()
    return clock() - start
