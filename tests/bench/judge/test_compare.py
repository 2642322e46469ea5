import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench_results import WORK, planted_result
from sglp_bench.devices.memory import MemoryReading
from sglp_bench.judge.compare import Comparison, compare_results
from sglp_bench.judge.ratio import judge
from sglp_bench.result import BenchmarkResult
from sglp_bench.workloads.generate import Workload
from sglp_deploy.errors import ArtifactError, BenchmarkError, ConfigError, IncomparableResultsError

SPEED = (
    "prefill_latency_s",
    "prefill_throughput_tokens_per_s",
    "decode_latency_s_per_token",
    "decode_throughput_tokens_per_s",
)


def compare(result: BenchmarkResult, **options: str) -> Comparison:
    return compare_results(result, resamples=500, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", SPEED)
def test_a_planted_speedup_is_found_with_its_verdict_on_every_metric(metric: str) -> None:
    found = compare(planted_result({"candidate": 1.2})).metrics[metric]
    assert found.interval is not None
    assert found.interval[0] < 1.2 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.1
    assert (found.verdict, found.resolved) == ("faster", True)
    assert found.words.startswith("candidate is 1.")
    assert len(found.pair_ratios) == 8
    assert found.p_value == 2 / 2**8


def test_a_planted_slowdown_is_slower() -> None:
    found = compare(planted_result({"candidate": 0.8})).metrics["decode_latency_s_per_token"]
    assert found.verdict == "slower"
    assert found.ratio == pytest.approx(0.8, rel=0.03)
    assert "candidate is 1.2" in found.words
    assert found.words.endswith("(below 1 is slower)")


def test_equal_arms_are_equivalent() -> None:
    found = compare(planted_result({"candidate": 1.0}, noise=0.003)).metrics["decode_latency_s_per_token"]
    assert (found.verdict, found.words.split(":")[0]) == ("equivalent", "equivalent")


def test_the_control_covers_one_as_often_as_its_interval_promises() -> None:
    covered = 0
    for seed in range(120):
        result = planted_result({"candidate": 1.2}, seed=seed)
        control = compare_results(result, resamples=2).metrics["prefill_latency_s"].control
        assert control is not None
        assert control.interval is not None
        covered += control.interval[0] <= 1 <= control.interval[1]
    assert covered >= 107  # 95 % of 120 is 114; fewer than 107 has a chance below 0.3 %


def test_noise_that_hides_the_effect_gives_inconclusive() -> None:
    found = compare(planted_result({"candidate": 1.02}, noise=0.2)).metrics["prefill_latency_s"]
    assert found.verdict == "inconclusive"
    assert "more cycles narrow it" in found.words


def test_a_steady_drift_cancels_in_the_mirrored_order() -> None:
    # Each block 2 % slower than the one before: half as slow again at the end, and the ratio stays put.
    found = compare(planted_result({"candidate": 1.2}, noise=1e-6, drift=0.02)).metrics["decode_latency_s_per_token"]
    assert found.ratio == pytest.approx(1.2, rel=0.005)


def test_the_level_of_each_arm_is_in_the_unit_of_the_name() -> None:
    metrics = compare(planted_result({"candidate": 1.25}, noise=1e-9)).metrics
    assert metrics["prefill_latency_s"].baseline == pytest.approx(0.3)
    assert metrics["decode_latency_s_per_token"].candidate == pytest.approx(0.04)
    assert metrics["prefill_throughput_tokens_per_s"].baseline == pytest.approx(10 / 0.3)
    assert metrics["decode_throughput_tokens_per_s"].candidate == pytest.approx(25)


@pytest.mark.parametrize(
    ("ratio", "interval", "floor", "verdict", "start"),
    [
        (1.2, (1.1, 1.3), 0.05, "faster", "it is 1.200x faster"),
        (0.8, (0.7, 0.9), 0.05, "slower", "it is 1.250x slower"),
        (1.005, (0.99, 1.015), 0.05, "equivalent", "equivalent: ratio 1.005"),
        (1.01, (1.005, 1.015), None, "equivalent", "equivalent: ratio 1.010"),
        (1.02, (0.99, 1.05), 0.05, "inconclusive", "inconclusive: ratio 1.020"),
        (1.03, (1.01, 1.05), 0.05, "inconclusive", "not resolved: ratio 1.030"),
        (1.03, (1.01, 1.05), 0.02, "faster", "it is 1.030x faster"),
        (0.97, (0.95, 0.99), 0.05, "inconclusive", "not resolved: ratio 0.970"),
        (1.2, None, None, "inconclusive", "inconclusive: ratio 1.200 from one pair"),
    ],
)
def test_verdicts(
    ratio: float, interval: tuple[float, float] | None, floor: float | None, verdict: str, start: str
) -> None:
    found, resolved, words = judge(ratio, interval, floor, candidate="it")
    assert found == verdict
    assert words.startswith(start)
    assert (resolved is None) == (floor is None)


def test_without_a_control_the_floor_is_unknown_and_that_is_noted() -> None:
    found = compare(planted_result(control=False))
    assert found.control is None
    assert found.metrics["prefill_latency_s"].resolved is None
    assert "no A/A control was run: the noise floor is unknown" in found.notes


def test_a_control_that_misses_one_raises_the_floor_to_its_whole_error() -> None:
    result = planted_result({"candidate": 1.1}, noise=0.002)
    slow = planted_result({"candidate": 1.1, "odd": 1.2}, noise=0.002).arm("odd")
    blocks = tuple(
        replace(block, samples=other.samples)
        for block, other in zip(result.arm("control").blocks, slow.blocks, strict=True)
    )
    control = replace(result.arm("control"), blocks=blocks)
    found = compare(replace(result, arms={**result.arms, "control": control})).metrics["prefill_latency_s"]
    assert found.control is not None
    assert found.control.noise_floor is not None
    assert found.control.noise_floor == pytest.approx(0.2, abs=0.01)
    assert (found.verdict, found.resolved) == ("inconclusive", False)
    assert found.words.startswith("not resolved")


def test_any_two_arms_of_a_run_can_be_compared() -> None:
    result = planted_result({"onnx": 2.0, "torch": 1.6})
    found = compare(result, baseline="torch", candidate="onnx")
    assert found.metrics["decode_latency_s_per_token"].ratio == pytest.approx(1.25, rel=0.02)
    assert set(found.arms) == {"torch", "onnx"}
    with pytest.raises(ConfigError, match=r"several candidates \(onnx, torch\); one is compared; pass candidate="):
        compare(result)


def test_two_runs_are_compared_without_pairs_and_that_is_noted() -> None:
    first, second = planted_result(seed=1), planted_result({"candidate": 1.2}, seed=2)
    found = compare_results(first, second, resamples=500)
    metric = found.metrics["decode_latency_s_per_token"]
    assert (found.paired, found.n_pairs, metric.p_value, metric.control) == (False, 0, None, None)
    assert metric.interval is not None
    assert metric.interval[0] < 1.2 < metric.interval[1]
    assert "the arms come from two runs: drift between the runs is part of the ratio" in found.notes


def test_each_run_is_counted_by_its_own_batch_when_two_are_compared_on_purpose() -> None:
    first = planted_result(noise=0.0)
    second = planted_result({"candidate": 1.0}, work=replace(WORK, batch_size=4), noise=0.0)
    found = compare_results(first, second, allow=["workload.batch_size"], resamples=500)
    assert found.metrics["decode_throughput_tokens_per_s"].ratio == pytest.approx(4)
    assert found.metrics["decode_latency_s_per_token"].ratio == pytest.approx(1)


def test_results_that_differ_in_workload_or_environment_are_refused_with_the_keys() -> None:
    first = planted_result()
    longer = Workload.from_json({**WORK.to_json(), "prompt_tokens": 11, "seed": 3})
    second = replace(planted_result(work=longer), environment={**first.environment, "python": "other"}, vocab_size=12)
    with pytest.raises(IncomparableResultsError, match="measure both in one run with the same workload") as caught:
        compare_results(first, second)
    assert caught.value.keys == ["workload.prompt_tokens", "workload.seed", "vocab_size", "environment.python"]


def test_another_precision_is_refused_unless_allowed_and_then_noted() -> None:
    result = planted_result(precisions={"candidate": "bf16"})
    with pytest.raises(IncomparableResultsError, match="the two results differ in precision") as caught:
        compare(result)
    assert caught.value.keys == ["precision"]
    found = compare_results(result, allow=["precision"], resamples=500)
    assert "precision differs between the arms and was allowed to" in found.notes


def test_bytes_have_a_ratio_but_no_interval() -> None:
    metrics = compare(planted_result({"candidate": 1.2})).metrics
    assert (metrics["weight_bytes"].ratio, metrics["weight_bytes"].verdict) == (1.2, "smaller")
    peak = metrics["peak_host_bytes"]
    assert peak.formula.endswith("probe VmHWM")
    assert (peak.interval, peak.verdict, peak.resolved) == (None, "smaller", True)
    assert peak.words == "candidate needs 1.255x less: 8,000 bytes against 10,040"
    assert "peak_device_bytes" not in metrics


def test_more_bytes_are_larger_and_two_per_cent_are_equivalent() -> None:
    result = planted_result({"candidate": 0.8})
    assert compare(result).metrics["weight_bytes"].verdict == "larger"
    assert compare(planted_result({"candidate": 1.01})).metrics["weight_bytes"].verdict == "equivalent"


def test_memory_of_different_probes_is_not_compared() -> None:
    result = planted_result()
    arm = replace(result.arm("candidate"), memory={"host_peak": MemoryReading("ru_maxrss", 5)})
    found = compare(replace(result, arms={**result.arms, "candidate": arm}))
    assert "peak_host_bytes" not in found.metrics
    assert any(note.startswith("peak_host_bytes is not compared") and "ru_maxrss" in note for note in found.notes)


def test_zero_bytes_are_refused() -> None:
    result = planted_result()
    arm = replace(result.arm("candidate"), memory={"host_peak": MemoryReading("VmHWM", 0)})
    with pytest.raises(BenchmarkError, match=r"peak_host_bytes is 10040 and 0; .*; measure the memory again"):
        compare(replace(result, arms={**result.arms, "candidate": arm}))


def test_notes_name_unsettled_blocks_load_and_differing_formats() -> None:
    result = planted_result(settled=False, load=3.0)
    other = replace(result.arm("candidate"), artifact={**result.arm("candidate").artifact, "format": "onnx"})
    notes = compare(replace(result, arms={**result.arms, "candidate": other})).notes
    assert "16 of 16 blocks never settled in their warm-up" in notes
    assert "16 of 16 blocks began with a load average above the 2 usable CPUs" in notes
    assert "the arms differ in format: fake and onnx" in notes


def test_percentiles_are_pooled_over_blocks_and_withheld_when_too_few() -> None:
    metrics = compare(planted_result()).metrics
    decode = metrics["decode_latency_s_per_token"].percentiles["candidate"]  # 8 blocks * 3 repeats * 8 steps = 192
    assert decode["p95"]["value"] is not None
    assert decode["p99"] == {"value": None, "reason": "n too small: 192 samples, p99 needs 473"}
    prefill = metrics["prefill_latency_s"].percentiles["baseline"]  # 8 * 5 = 40
    assert prefill["p90"]["reason"] == "n too small: 40 samples, p90 needs 46"


def test_ceilings_are_attached_by_metric() -> None:
    found = compare(planted_result({"candidate": 1.2}, noise=1e-9)).with_ceilings({"prefill_latency_s": 1.25})
    metric = found.metrics["prefill_latency_s"]
    assert metric.ceiling == 1.25
    assert metric.fraction_of_ceiling == pytest.approx(0.96)
    assert metric.gain_fraction == pytest.approx(0.8)
    with pytest.raises(ConfigError, match="a ceiling is given for speed, which was not compared"):
        found.with_ceilings({"speed": 2.0})


def test_a_comparison_survives_its_file_and_is_reproducible(tmp_path: Path) -> None:
    result = planted_result()
    found = compare(result).with_ceilings({"prefill_latency_s": 1.25})
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == found
    assert compare(result) == compare(result)
    value = json.loads((tmp_path / "comparison.json").read_text())
    assert value["schema"] == "comparison/2"
    assert value["metrics"]["prefill_latency_s"]["control"].keys() == {"ratio", "interval", "noise_floor"}


def test_an_incomplete_comparison_is_refused() -> None:
    value = compare(planted_result()).to_json()
    del value["metrics"]["prefill_latency_s"]["control"]
    with pytest.raises(ArtifactError, match=r"mistypes a field; metrics\.prefill_latency_s\.control is missing"):
        Comparison.from_json(value)


def test_a_comparison_of_the_first_schema_is_still_read(tmp_path: Path) -> None:
    files = sorted(Path(__file__).parents[3].glob("bench/results/*-comparison.json"))
    assert files
    for file in files:
        older = json.loads(file.read_text(encoding="utf-8")) | {"schema": "comparison/1"}
        del older["device"], older["workload"]["kind"]  # what the second schema added
        (tmp_path / "older.json").write_text(json.dumps(older), encoding="utf-8")
        found = Comparison.load(tmp_path / "older.json")
        assert (found.device, found.workload.kind) == ("here", "generate")
        found.save(tmp_path / "again.json")
        assert Comparison.load(tmp_path / "again.json") == found


def test_a_comparison_names_the_place_of_its_result() -> None:
    found = compare(replace(planted_result(), device="ssh://board"))
    assert found.device == "ssh://board"
    value = found.to_json()
    assert Comparison.from_json(value).device == "ssh://board"
    del value["device"]
    with pytest.raises(ArtifactError, match=r"KeyError\('device'\)"):
        Comparison.from_json(value)
