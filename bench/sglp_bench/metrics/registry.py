"""Every metric there is, in the order of the files; the one list that comparing, judging and reporting read."""

from __future__ import annotations

from sglp_bench.metrics.decode import DECODE_LATENCY, DECODE_THROUGHPUT
from sglp_bench.metrics.memory import PEAK_DEVICE, PEAK_HOST, WEIGHTS
from sglp_bench.metrics.metric import MemoryMetric, Metric, TimeMetric
from sglp_bench.metrics.prefill import PREFILL_LATENCY, PREFILL_THROUGHPUT

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        PREFILL_LATENCY,
        PREFILL_THROUGHPUT,
        DECODE_LATENCY,
        DECODE_THROUGHPUT,
        PEAK_HOST,
        PEAK_DEVICE,
        WEIGHTS,
    )
}

TIME_METRICS = {name: metric for name, metric in METRICS.items() if isinstance(metric, TimeMetric)}
MEMORY_METRICS = {name: metric for name, metric in METRICS.items() if isinstance(metric, MemoryMetric)}
