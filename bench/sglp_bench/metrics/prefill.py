"""How fast a prompt is read."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sglp_bench.metrics.metric import TimeMetric

SERIES = "prefill_s"


class _Samples(Protocol):
    @property
    def prefill_s(self) -> tuple[float, ...]: ...


class _Work(Protocol):
    @property
    def batch_size(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...


def _calls(samples: _Samples) -> NDArray[np.float64]:
    return np.asarray(samples.prefill_s, dtype=np.float64)


def _latency(samples: _Samples, work: _Work) -> NDArray[np.float64]:
    del work
    return _calls(samples)


def _throughput(samples: _Samples, work: _Work) -> NDArray[np.float64]:
    return work.batch_size * work.prompt_tokens / _calls(samples)


PREFILL_LATENCY = TimeMetric(
    name="prefill_latency_s",
    label="Prefill",
    unit="latency per call",
    formula="time of one prefill call (TTFT without tokenizer and sampling)",
    higher_is_better=False,
    series=SERIES,
    iterations=_latency,
    raw=_calls,
    claimed=True,
    card="Prefill speed",
    place=30,
)

PREFILL_THROUGHPUT = TimeMetric(
    name="prefill_throughput_tokens_per_s",
    label="Prefill throughput",
    unit="tokens per second",
    formula="batch_size * prompt_tokens / time of one prefill call",
    higher_is_better=True,
    series=SERIES,
    iterations=_throughput,
    claimed=False,  # the latency turned upside down: claimed once
    place=40,
)
