"""What ``comparison.json`` holds: the ratio of two arms on every metric, with everything a verdict rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sglp_bench.judge.ceiling import fraction_of_ceiling, gain_fraction
from sglp_bench.result import BenchmarkResult
from sglp_bench.workloads.kinds import workload_from_json
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, ConfigError

SCHEMA = "comparison/2"  # history: 1 = first; 2 = the workload's kind, the device
VERSIONS = (1, 2)  # those that are read

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
        """Inverse of ``dataclasses.asdict``."""
        tuples = {key: _tuple(value[key]) for key in ("interval", "bootstrap_interval", "pair_ratios")}
        found = value["control"]
        control = None if found is None else Control(**{**found, "interval": _tuple(found["interval"])})
        return cls(**{**value, **tuples, "control": control})


@dataclass(frozen=True)
class Comparison:
    """Two arms compared on every metric.

    Attributes:
        baseline: Label of the arm in the denominator of a speedup.
        candidate: Label of the other arm.
        control: Label of the A/A control, or None.
        paired: True when both arms come from one interleaved run.
        n_pairs: Pairs of blocks (0 when not paired).
        workload: What both did.
        environment: Where.
        device: Name of the place, as in the result.
        arms: The two labels to their facts (:func:`sglp_bench.result.summarise_arm`).
        metrics: Metric name to comparison.
        notes: What a reader should know before quoting a number.
        result: The raw samples, when this object was made in this process; not part of the file.
    """

    baseline: str
    candidate: str
    control: str | None
    paired: bool
    n_pairs: int
    workload: BenchmarkWorkload
    environment: Mapping[str, Any]
    arms: Mapping[str, Any]
    metrics: Mapping[str, MetricComparison]
    notes: tuple[str, ...] = ()
    device: str = "here"
    result: BenchmarkResult | None = field(default=None, repr=False, compare=False)

    def with_ceilings(self, ceilings: Mapping[str, float]) -> Comparison:
        """The same comparison with the largest possible ratio of some metrics (see :mod:`sglp_bench.judge.ceiling`).

        Raises:
            ConfigError: If a metric is unknown.
        """
        if unknown := sorted(set(ceilings) - set(self.metrics)):
            raise ConfigError(
                f"a ceiling is given for {', '.join(unknown)}, which was not compared; "
                f"the metrics are {', '.join(self.metrics)}; correct the name"
            )
        changed = {
            name: replace(
                self.metrics[name],
                ceiling=ceiling,
                fraction_of_ceiling=fraction_of_ceiling(self.metrics[name].ratio, ceiling),
                gain_fraction=gain_fraction(self.metrics[name].ratio, ceiling),
            )
            for name, ceiling in ceilings.items()
        }
        return replace(self, metrics={**self.metrics, **changed})

    def to_json(self) -> dict[str, Any]:
        """The content of ``comparison.json``."""
        return {
            "schema": SCHEMA,
            "baseline": self.baseline,
            "candidate": self.candidate,
            "control": self.control,
            "paired": self.paired,
            "n_pairs": self.n_pairs,
            "workload": self.workload.to_json(),
            "workload_digest": self.workload.digest,
            "device": self.device,
            "environment": dict(self.environment),
            "arms": dict(self.arms),
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """Inverse of :meth:`to_json`; ``result`` is None, and ``comparison/1`` is read too.

        Raises:
            ArtifactError: If a field is missing or mistyped.
        """
        try:
            return cls(
                workload=workload_from_json(value["workload"]),
                metrics={name: MetricComparison.from_json(metric) for name, metric in value["metrics"].items()},
                notes=tuple(value["notes"]),
                device="here" if value["schema"] == "comparison/1" else value["device"],
                **{
                    key: value[key]
                    for key in ("baseline", "candidate", "control", "paired", "n_pairs", "environment", "arms")
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the comparison lacks or mistypes a field; {error!r}; make it again") from error

    def save(self, path: str | Path) -> None:
        """Write ``comparison.json`` atomically."""
        _io.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: If the file is missing, incomplete, or of an unknown schema.
        """
        return cls.from_json(_io.read_json(Path(path), "comparison", VERSIONS))


def _tuple(value: Sequence[float] | None) -> Any:
    return None if value is None else tuple(value)
