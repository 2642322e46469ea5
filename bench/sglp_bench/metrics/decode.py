"""How fast tokens follow one another."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglp_bench.metrics.metric import TimeMetric

SERIES = "decode_s"


class _Samples(Protocol):
    @property
    def decode_s(self) -> tuple[tuple[float, ...], ...]: ...


class _Work(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...


def _steps(samples: _Samples) -> NDArray[np.float64]:
    # (repeats, steps)
    return np.asarray(samples.decode_s, dtype=np.float64)


def _latency(samples: _Samples, work: _Work) -> NDArray[np.float64]:
    del work
    return np.asarray(np.median(_steps(samples), axis=1))


def _throughput(samples: _Samples, work: _Work) -> NDArray[np.float64]:
    return np.asarray(work.batch_size * work.decode_tokens / _steps(samples).sum(axis=1))


def _every_step(samples: _Samples) -> NDArray[np.float64]:
    return _steps(samples).ravel()


DECODE_LATENCY = TimeMetric(
    name="decode_latency_s_per_token",
    label="Decode step",
    unit="latency per token",
    formula="median over decode steps 1..n of the time of one step (TPOT; one token per sequence)",
    higher_is_better=False,
    series=SERIES,
    iterations=_latency,
    raw=_every_step,
    claimed=True,
    card="Decode speed",
    place=10,
)

DECODE_THROUGHPUT = TimeMetric(
    name="decode_throughput_tokens_per_s",
    label="Decode throughput",
    unit="tokens per second",
    formula="batch_size * n / sum of the times of decode steps 1..n",
    higher_is_better=True,
    series=SERIES,
    iterations=_throughput,
    claimed=False,  # the latency turned upside down: claimed once
    place=20,
)
