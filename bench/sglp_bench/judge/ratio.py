"""One metric of two arms: the ratio, how sure it is, and the sentence that may be said about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_bench.judge.intervals import hierarchical_bootstrap, percentiles, sign_flip_p, t_interval, welch_interval
from sglp_bench.metrics.metric import MemoryMetric, TimeMetric
from sglp_bench.result import ArmResult, BenchmarkResult
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy.errors import BenchmarkError

EQUIVALENCE = 0.02  # an interval wholly within 1 +- this is "equivalent"

Interval = tuple[float, float]


@dataclass(frozen=True)
class Control:
    """The baseline against its own second instance: what the schedule reports when there is no difference.

    Attributes:
        ratio: Should be near 1.
        interval: 95 % interval of ``ratio``; None for bytes and below two pairs.
        noise_floor: Relative size below which a difference is "not resolved": half the width of the interval, or its
            far end when the interval misses 1; for bytes the difference itself.
    """

    ratio: float
    interval: Interval | None
    noise_floor: float | None


@dataclass(frozen=True)
class MetricComparison:
    """One metric of two arms.

    Attributes:
        metric: Name, with its unit.
        formula: What one iteration's value is; a block's value is the median over its iterations.
        baseline: Median over the baseline's blocks, in the unit of the name.
        candidate: The same for the candidate.
        ratio: Above 1 when the candidate is better (faster, smaller): exp of the mean log-ratio of the pairs.
        interval: 95 % interval of ``ratio`` (Student's t over pairs); None for bytes and below two pairs.
        bootstrap_interval: Second view, hierarchical bootstrap; wider by construction.
        p_value: Second view, two-sided sign-flip permutation over the pairs.
        pair_ratios: The ratio of each pair, in schedule order.
        control: The A/A control on the same metric, or None.
        resolved: Whether the difference exceeds the control's noise floor; None without a control.
        verdict: "faster", "slower", "equivalent" or "inconclusive"; for bytes "smaller", "larger", "equivalent".
        words: The verdict as a sentence with its numbers.
        percentiles: ``{"baseline", "candidate"}`` to percentiles over all raw samples
            (:func:`sglp_bench.judge.intervals.percentiles`).
        ceiling: Largest possible ratio, when given.
        fraction_of_ceiling: ``ratio / ceiling``.
        gain_fraction: ``(ratio - 1) / (ceiling - 1)``.
    """

    metric: str
    formula: str
    baseline: float
    candidate: float
    ratio: float
    interval: Interval | None
    verdict: str
    words: str
    bootstrap_interval: Interval | None = None
    p_value: float | None = None
    pair_ratios: tuple[float, ...] = ()
    control: Control | None = None
    resolved: bool | None = None
    percentiles: Mapping[str, Any] = field(default_factory=dict)
    ceiling: float | None = None
    fraction_of_ceiling: float | None = None
    gain_fraction: float | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MetricComparison:
        """Inverse of ``dataclasses.asdict``.

        Raises:
            KeyError, TypeError, AttributeError: If a field is missing or mistyped, or a ratio is not above zero.
        """
        tuples = {key: _tuple(value[key]) for key in ("interval", "bootstrap_interval", "pair_ratios")}
        found = value["control"]
        control = None if found is None else Control(**{**found, "interval": _tuple(found["interval"])})
        given = [value["ratio"], *(number for each in tuples.values() for number in each or ())]
        given += [] if control is None else list(control.interval or ())
        if not all(number is None or number > 0 for number in given):
            raise TypeError("a ratio is not above zero")
        return cls(**{**value, **tuples, "control": control})


@dataclass(frozen=True)
class Sides:
    """The two arms of a comparison, each in the run that measured it.

    Attributes:
        result: Holds the baseline arm.
        other: Holds the candidate arm; the same object when one interleaved run holds both.
        baseline: Label.
        candidate: Label.
    """

    result: BenchmarkResult
    other: BenchmarkResult
    baseline: str
    candidate: str

    @property
    def paired(self) -> bool:
        """Whether blocks of the two were measured next to each other."""
        return self.other is self.result

    @property
    def arms(self) -> tuple[ArmResult, ArmResult]:
        """Baseline and candidate."""
        return self.result.arm(self.baseline), self.other.arm(self.candidate)

    @property
    def control(self) -> Sides | None:
        """The run's baseline against its second instance; None when the run had none or there are two runs."""
        if not self.paired or self.result.control is None:
            return None
        return Sides(self.result, self.result, self.result.baseline, self.result.control)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions in the two lists of blocks that were measured in the same half of the same cycle, if in one run."""
        if not self.paired:
            return []
        left, right = self.arms
        places = {block.pair: place for place, block in enumerate(right.blocks)}
        return [(place, places[block.pair]) for place, block in enumerate(left.blocks) if block.pair in places]

    def iterations(self, metric: TimeMetric) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Values of both arms, each (blocks, iterations); when paired, row i of one belongs to row i of the other."""
        left, right = self.arms
        first = [place for place, _ in self.pairs] if self.paired else None
        second = [place for _, place in self.pairs] if self.paired else None
        return (
            _iterations(metric, left, self.result.workload, first),
            _iterations(metric, right, self.other.workload, second),
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


def compare_times(metric: TimeMetric, sides: Sides, *, resamples: int, seed: int) -> MetricComparison:
    """The ratio on a time, over pairs of blocks where there are pairs.

    Args:
        metric: A metric of the series both recorded.
        sides: The two arms.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap and of the permutation.
    """
    paired, (left, right) = sides.paired, sides.arms
    a, b = sides.iterations(metric)
    if metric.higher_is_better:
        a, b = 1 / a, 1 / b  # so that log(a / b) > 0 means that the candidate is better, for every metric
    logs = np.log(np.median(a, axis=1)), np.log(np.median(b, axis=1))
    ratios = logs[0] - logs[1] if paired else np.empty(0)
    log_ratio = float(logs[0].mean() - logs[1].mean())
    interval = t_interval(ratios) if paired else welch_interval(*logs)
    bootstrap = hierarchical_bootstrap(a, b, paired=paired, resamples=resamples, seed=seed)
    control = _control(metric, sides)
    floor = control.noise_floor if control else None
    verdict, resolved, words = judge(math.exp(log_ratio), _exp(interval), floor, candidate=sides.candidate)
    return MetricComparison(
        metric=metric.name,
        formula=metric.formula,
        baseline=_level(metric, left, sides.result.workload),
        candidate=_level(metric, right, sides.other.workload),
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


def compare_bytes(metric: MemoryMetric, sides: Sides) -> MetricComparison:
    """The ratio on bytes, which has no interval; both arms have a reading of the same probe.

    Raises:
        BenchmarkError: If a reading is zero.
    """
    a, b = _bytes(metric, sides)
    if not a or not b:
        raise BenchmarkError(f"{metric.name} is {a} and {b}; a ratio needs both above zero; measure the memory again")
    ratio = a / b
    control = None
    if metric.measured and sides.control is not None:
        first, second = _bytes(metric, sides.control)
        if first and second:
            control = Control(first / second, None, math.expm1(abs(math.log(first / second))))
    resolved = None if control is None else abs(math.log(ratio)) > abs(math.log(control.ratio))
    if resolved is False or abs(ratio - 1) <= EQUIVALENCE:
        verdict, words = "equivalent", f"equivalent: {b:,} bytes against {a:,}"
    elif ratio > 1:
        verdict, words = "smaller", f"{sides.candidate} needs {ratio:.3f}x less: {b:,} bytes against {a:,}"
    else:
        verdict, words = "larger", f"{sides.candidate} needs {1 / ratio:.3f}x more: {b:,} bytes against {a:,}"
    left = sides.arms[0]
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


def _control(metric: TimeMetric, sides: Sides) -> Control | None:
    if sides.control is None:
        return None
    a, b = (np.log(np.median(values, axis=1)) for values in sides.control.iterations(metric))
    ratios = b - a if metric.higher_is_better else a - b
    ratio, interval = math.exp(float(ratios.mean())), t_interval(ratios)
    if interval is None:
        return Control(ratio, None, None)
    low, high = interval
    # When the control itself misses 1, the schedule or the machine favours one place: the floor is the whole error.
    half = (high - low) / 2 if low <= 0 <= high else max(abs(low), abs(high))
    return Control(ratio, _exp(interval), math.expm1(half))


def _bytes(metric: MemoryMetric, sides: Sides) -> list[int | None]:
    return [metric.read(arm.artifact, arm.memory).bytes for arm in sides.arms]


def _iterations(
    metric: TimeMetric, arm: ArmResult, work: BenchmarkWorkload, places: Sequence[int] | None = None
) -> NDArray[np.float64]:
    blocks = arm.blocks if places is None else [arm.blocks[place] for place in places]
    return np.stack([metric.iterations(block.samples, work) for block in blocks])


def _level(metric: TimeMetric, arm: ArmResult, work: BenchmarkWorkload) -> float:
    return float(np.median(np.median(_iterations(metric, arm, work), axis=1)))


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))


def _tuple(value: Sequence[float] | None) -> Any:
    return None if value is None else tuple(value)
