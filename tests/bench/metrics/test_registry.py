from typing import Any

import numpy as np
import pytest

from bench_results import planted_result
from sglp_bench.devices.memory import MemoryReading
from sglp_bench.judge.compare import compare_results
from sglp_bench.metrics.registry import MEMORY_METRICS, METRICS, TIME_METRICS
from sglp_bench.workloads.generate import Workload
from sglp_bench.workloads.generate_samples import BlockSamples, WarmUp


def test_metrics_of_a_block_worked_by_hand() -> None:
    work = Workload("hand", batch_size=2, prompt_tokens=10, decode_tokens=3, prefill_repeats=2, decode_repeats=2)
    samples = BlockSamples((0.5, 0.25), ((0.1, 0.2, 0.6), (0.1, 0.1, 0.2)), WarmUp((), (), True))

    def values(metric: str) -> list[float]:
        return list(TIME_METRICS[metric].iterations(samples, work))

    assert values("prefill_latency_s") == [0.5, 0.25]
    assert values("prefill_throughput_tokens_per_s") == [40.0, 80.0]  # 2 * 10 tokens
    assert values("decode_latency_s_per_token") == [0.2, 0.1]
    assert values("decode_throughput_tokens_per_s") == pytest.approx([2 * 3 / 0.9, 2 * 3 / 0.4])
    raw = TIME_METRICS["decode_latency_s_per_token"].raw
    assert raw is not None
    np.testing.assert_array_equal(raw(samples), [0.1, 0.2, 0.6, 0.1, 0.1, 0.2])


def test_memory_metrics_are_read_from_the_manifest_and_from_the_ladder() -> None:
    artifact: dict[str, Any] = {"weight_bytes": 70}
    memory = {"host_idle": MemoryReading("VmRSS", 1), "host_peak": MemoryReading("VmHWM", 90)}
    read = {name: metric.read(artifact, memory) for name, metric in MEMORY_METRICS.items()}
    assert read["weight_bytes"] == MemoryReading("manifest", 70)
    assert read["peak_host_bytes"] == MemoryReading("VmHWM", 90)
    assert read["peak_device_bytes"] == MemoryReading("none", None, "not read on this device")
    memory["device_allocated_peak"] = MemoryReading("torch", 50)
    assert MEMORY_METRICS["peak_device_bytes"].read(artifact, memory).bytes == 50


def test_a_comparison_holds_the_metrics_in_the_order_of_the_files() -> None:
    assert list(METRICS) == [*TIME_METRICS, *MEMORY_METRICS]
    found = list(compare_results(planted_result(), resamples=10).metrics)
    assert found == [
        "prefill_latency_s", "prefill_throughput_tokens_per_s", "decode_latency_s_per_token",
        "decode_throughput_tokens_per_s", "peak_host_bytes", "weight_bytes",
    ]  # fmt: skip


def test_only_latencies_are_claimed_and_a_throughput_is_the_better_the_higher() -> None:
    latencies = {"prefill_latency_s", "decode_latency_s_per_token"}
    assert {metric.name for metric in METRICS.values() if metric.claimed} == latencies
    assert {metric.name for metric in METRICS.values() if metric.card} == latencies
    assert {name for name in METRICS if "throughput" in name} == {
        metric.name for metric in METRICS.values() if metric.higher_is_better
    }


def test_every_metric_says_what_a_reader_needs_and_stands_in_a_place_of_its_own() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.label
        assert metric.formula
    assert len({metric.place for metric in METRICS.values()}) == len(METRICS)
