"""From raw samples to a sentence: the ratio of two arms, how sure it is, and what may be claimed from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sglp_bench.devices.environment import differing_keys
from sglp_bench.judge.certificates import unverified_note
from sglp_bench.judge.comparison import Comparison, Control, Interval, MetricComparison
from sglp_bench.judge.intervals import hierarchical_bootstrap, percentiles, sign_flip_p, t_interval, welch_interval
from sglp_bench.metrics.metric import MemoryMetric, TimeMetric
from sglp_bench.metrics.registry import MEMORY_METRICS, TIME_METRICS
from sglp_bench.result import ArmResult, BenchmarkResult, summarise_arm
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy.errors import BenchmarkError, ConfigError, IncomparableResultsError

__all__ = ["EQUIVALENCE", "Comparison", "Control", "MetricComparison", "compare_results", "judge"]

EQUIVALENCE = 0.02  # an interval wholly within 1 +- this is "equivalent"


def compare_results(
    result: BenchmarkResult,
    other: BenchmarkResult | None = None,
    *,
    baseline: str | None = None,
    candidate: str | None = None,
    allow: Sequence[str] = (),
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two arms of one run (paired), or one arm of each of two runs (not paired).

    Args:
        result: Holds the baseline arm.
        other: Holds the candidate arm; the same run when omitted.
        baseline: Label; the run's own baseline when omitted.
        candidate: Label; may be omitted when there is only one.
        allow: Keys that may differ, for example ``("precision",)`` across runtimes; each is noted.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap and of the permutation.

    Raises:
        IncomparableResultsError: If workload, vocabulary, environment or precision differ and that is not allowed.
        ConfigError: If ``candidate`` is omitted and not obvious.
        BenchmarkError: If a label is unknown.
    """
    paired = other is None or other is result
    other = result if other is None else other
    baseline = result.baseline if baseline is None else baseline
    candidate = _only_candidate(other) if candidate is None else candidate
    left, right = result.arm(baseline), other.arm(candidate)
    different = _differences(result, other, left, right)
    if forbidden := [key for key in different if key not in allow]:
        raise IncomparableResultsError(forbidden)
    control = result.control if paired else None
    metrics = {
        name: _compare_times(metric, result, other, left, right, paired, (baseline, candidate), resamples, seed)
        for name, metric in TIME_METRICS.items()
        if metric.series in result.workload.series
    }
    notes = _notes(result, left, right, paired, different, (baseline, candidate))
    for name, memory in MEMORY_METRICS.items():
        readings = [memory.read(arm.artifact, arm.memory) for arm in (left, right)]
        if None in (readings[0].bytes, readings[1].bytes) or readings[0].probe != readings[1].probe:
            if not memory.device_only or result.workload.device != "cpu":
                notes.append(f"{name} is not compared: {readings[0]}, {readings[1]}")
            continue
        metrics[name] = _compare_bytes(memory, result if paired else None, left, right, candidate)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        control=control,
        paired=paired,
        n_pairs=len(_pairs(left, right)) if paired else 0,
        workload=result.workload,
        environment=result.environment,
        arms={baseline: summarise_arm(left), candidate: summarise_arm(right)},
        metrics=metrics,
        notes=tuple(notes),
        device=result.device,
        result=result if paired else None,
    )


def judge(
    ratio: float, interval: Interval | None, noise_floor: float | None, *, candidate: str = "candidate"
) -> tuple[str, bool | None, str]:
    """The verdict on a speedup ratio, whether it stands above the noise floor, and the sentence that says so.

    An interval wholly within 0.98 to 1.02 is "equivalent", one wholly on one side of 1 is "faster" or "slower", all
    else is "inconclusive".  A difference below the noise floor of the A/A control is "inconclusive", not resolved.
    """
    resolved = None if noise_floor is None else abs(math.log(ratio)) > math.log1p(noise_floor)
    if interval is None:
        return "inconclusive", resolved, f"inconclusive: ratio {ratio:.3f} from one pair, which gives no interval"
    low, high = interval
    span = f"95 % interval {low:.3f} to {high:.3f}"
    if low >= 1 - EQUIVALENCE and high <= 1 + EQUIVALENCE:
        return "equivalent", resolved, f"equivalent: ratio {ratio:.3f}, {span}, wholly within {EQUIVALENCE:.0%} of 1"
    if low <= 1 <= high:
        return "inconclusive", resolved, f"inconclusive: ratio {ratio:.3f}, {span} holds 1; more cycles narrow it"
    if resolved is False:
        return (
            "inconclusive",
            resolved,
            f"not resolved: ratio {ratio:.3f}, {span}, is smaller than the noise floor of {noise_floor:.1%} "
            "that the baseline shows against itself",
        )
    if low > 1:
        return "faster", resolved, f"{candidate} is {ratio:.3f}x faster, {span}"
    return "slower", resolved, f"{candidate} is {1 / ratio:.3f}x slower, {span} (below 1 is slower)"


def _compare_times(
    metric: TimeMetric,
    result: BenchmarkResult,
    other: BenchmarkResult,
    left: ArmResult,
    right: ArmResult,
    paired: bool,
    labels: tuple[str, str],
    resamples: int,
    seed: int,
) -> MetricComparison:
    work = result.workload
    pairs = _pairs(left, right) if paired else []
    a = _iterations(metric, left, work, [first for first, _ in pairs] if paired else None)
    b = _iterations(metric, right, other.workload, [second for _, second in pairs] if paired else None)
    if metric.higher_is_better:
        a, b = 1 / a, 1 / b  # so that log(a / b) > 0 means that the candidate is better, for every metric
    logs = np.log(np.median(a, axis=1)), np.log(np.median(b, axis=1))
    ratios = logs[0] - logs[1] if paired else np.empty(0)
    log_ratio = float(logs[0].mean() - logs[1].mean())
    interval = t_interval(ratios) if paired else welch_interval(*logs)
    bootstrap = hierarchical_bootstrap(a, b, paired=paired, resamples=resamples, seed=seed)
    control = _control(metric, result) if paired else None
    floor = control.noise_floor if control else None
    verdict, resolved, words = judge(math.exp(log_ratio), _exp(interval), floor, candidate=labels[1])
    return MetricComparison(
        metric=metric.name,
        formula=metric.formula,
        baseline=_level(metric, left, work),
        candidate=_level(metric, right, other.workload),
        ratio=math.exp(log_ratio),
        interval=_exp(interval),
        verdict=verdict,
        words=words,
        bootstrap_interval=_exp(bootstrap),
        p_value=sign_flip_p(ratios, resamples=resamples, seed=seed) if paired else None,
        pair_ratios=tuple(math.exp(value) for value in ratios),
        control=control,
        resolved=resolved,
        percentiles={
            side: percentiles(np.concatenate([metric.raw(block.samples) for block in arm.blocks]))
            for side, arm in (("baseline", left), ("candidate", right))
        }
        if metric.raw
        else {},
    )


def _control(metric: TimeMetric, result: BenchmarkResult) -> Control | None:
    if result.control is None:
        return None
    base, control = result.arm(result.baseline), result.arm(result.control)
    pairs = _pairs(base, control)
    a = np.log(np.median(_iterations(metric, base, result.workload, [first for first, _ in pairs]), axis=1))
    b = np.log(np.median(_iterations(metric, control, result.workload, [second for _, second in pairs]), axis=1))
    ratios = b - a if metric.higher_is_better else a - b
    ratio, interval = math.exp(float(ratios.mean())), t_interval(ratios)
    if interval is None:
        return Control(ratio, None, None)
    low, high = interval
    # When the control itself misses 1, the schedule or the machine favours one place: the floor is the whole error.
    half = (high - low) / 2 if low <= 0 <= high else max(abs(low), abs(high))
    return Control(ratio, _exp(interval), math.expm1(half))


def _compare_bytes(
    metric: MemoryMetric, result: BenchmarkResult | None, left: ArmResult, right: ArmResult, candidate: str
) -> MetricComparison:
    a, b = (metric.read(arm.artifact, arm.memory).bytes for arm in (left, right))
    if not a or not b:
        raise BenchmarkError(f"{metric.name} is {a} and {b}; a ratio needs both above zero; measure the memory again")
    ratio = a / b
    control = None
    if result is not None and result.control is not None and metric.measured:
        arms = (result.arm(result.baseline), result.arm(result.control))
        first, second = (metric.read(arm.artifact, arm.memory).bytes for arm in arms)
        if first and second:
            control = Control(first / second, None, math.expm1(abs(math.log(first / second))))
    resolved = None if control is None else abs(math.log(ratio)) > abs(math.log(control.ratio))
    if resolved is False or abs(ratio - 1) <= EQUIVALENCE:
        verdict, words = "equivalent", f"equivalent: {b:,} bytes against {a:,}"
    elif ratio > 1:
        verdict, words = "smaller", f"{candidate} needs {ratio:.3f}x less: {b:,} bytes against {a:,}"
    else:
        verdict, words = "larger", f"{candidate} needs {1 / ratio:.3f}x more: {b:,} bytes against {a:,}"
    return MetricComparison(
        metric=metric.name,
        formula=f"{metric.formula}; probe {metric.read(left.artifact, left.memory).probe}",
        baseline=float(a),
        candidate=float(b),
        ratio=ratio,
        interval=None,
        verdict=verdict,
        words=words,
        control=control,
        resolved=resolved,
    )


def _pairs(left: ArmResult, right: ArmResult) -> list[tuple[int, int]]:
    # Positions in the two lists of blocks that were measured in the same half of the same cycle.
    places = {block.pair: place for place, block in enumerate(right.blocks)}
    return [(place, places[block.pair]) for place, block in enumerate(left.blocks) if block.pair in places]


def _iterations(
    metric: TimeMetric, arm: ArmResult, work: BenchmarkWorkload, places: Sequence[int] | None = None
) -> NDArray[np.float64]:
    blocks = arm.blocks if places is None else [arm.blocks[place] for place in places]
    return np.stack([metric.iterations(block.samples, work) for block in blocks])


def _level(metric: TimeMetric, arm: ArmResult, work: BenchmarkWorkload) -> float:
    return float(np.median(np.median(_iterations(metric, arm, work), axis=1)))


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def _only_candidate(result: BenchmarkResult) -> str:
    names = result.candidates or [result.baseline]
    if len(names) > 1:
        raise ConfigError(f"the result has several candidates ({', '.join(names)}); one is compared; pass candidate=")
    return names[0]


def _differences(result: BenchmarkResult, other: BenchmarkResult, left: ArmResult, right: ArmResult) -> list[str]:
    work, work_other = result.workload.to_json(), other.workload.to_json()
    keys = [f"workload.{key}" for key in work | work_other if work.get(key) != work_other.get(key)]
    if result.vocab_size != other.vocab_size:
        keys.append("vocab_size")
    keys += [f"environment.{key}" for key in differing_keys(result.environment, other.environment)]
    if left.artifact["precision"] != right.artifact["precision"]:
        keys.append("precision")
    return keys


def _notes(
    result: BenchmarkResult,
    left: ArmResult,
    right: ArmResult,
    paired: bool,
    different: Sequence[str],
    labels: tuple[str, str],
) -> list[str]:
    found = [unverified_note(label, arm.artifact) for label, arm in zip(labels, (left, right), strict=True)]
    notes = [note for note in found if note]  # first, because every number below them is of something unknown
    notes += [f"{key} differs between the arms and was allowed to" for key in different]
    if not paired:
        notes.append("the arms come from two runs: drift between the runs is part of the ratio")
    if paired and result.control is None:
        notes.append("no A/A control was run: the noise floor is unknown")
    if paired and result.control is not None and labels[0] != result.baseline:
        notes.append(f"the A/A control repeats {result.baseline}, the baseline of the run, and not {labels[0]}")
    for key in ("format", "model_fingerprint"):
        if left.artifact[key] != right.artifact[key]:
            notes.append(f"the arms differ in {key}: {left.artifact[key]} and {right.artifact[key]}")
    blocks = [*left.blocks, *right.blocks]
    if count := sum(not block.samples.settled for block in blocks):
        notes.append(f"{count} of {len(blocks)} blocks never settled in their warm-up")
    cpus = result.environment.get("cpus_usable")
    loads = [block.conditions.get("start", {}).get("load_average_1min") for block in blocks]
    if cpus and (busy := sum(load is not None and load > cpus for load in loads)):
        notes.append(f"{busy} of {len(blocks)} blocks began with a load average above the {cpus} usable CPUs")
    return notes
