"""Two arms compared on every metric: what may be compared, what a reader must know, and ``comparison.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sglp_bench.devices.environment import differing_keys
from sglp_bench.judge.ceiling import fraction_of_ceiling, gain_fraction
from sglp_bench.judge.certificates import unverified_note
from sglp_bench.judge.ratio import MetricComparison, Sides, compare_bytes, compare_times
from sglp_bench.metrics.registry import MEMORY_METRICS, TIME_METRICS
from sglp_bench.result import BenchmarkResult, summarise_arm
from sglp_bench.workloads.kinds import workload_from_json
from sglp_bench.workloads.protocol import BenchmarkWorkload
from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, BenchmarkError, ConfigError, IncomparableResultsError

SCHEMA = "comparison/2"  # history: 1 = first; 2 = the workload's kind, the device
VERSIONS = (1, 2)  # those that are read


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
        from sglp_bench import shapes  # what checks types loads only where a file is read

        shapes.refuse_mistyped(shapes.Comparison, value, "the comparison", "make it again")
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
    other = result if other is None else other
    baseline = result.baseline if baseline is None else baseline
    candidate = _only_candidate(other) if candidate is None else candidate
    sides = Sides(result, other, baseline, candidate)
    different = _differences(sides)
    if forbidden := [key for key in different if key not in allow]:
        raise IncomparableResultsError(forbidden)
    if sides.paired and not sides.pairs:
        raise BenchmarkError(
            f"no block of {baseline!r} and {candidate!r} was measured in the same half of the same cycle; without "
            "pairs of blocks there is no ratio; measure them again in one run"
        )
    metrics = {
        name: compare_times(metric, sides, resamples=resamples, seed=seed)
        for name, metric in TIME_METRICS.items()
        if metric.series in result.workload.series
    }
    notes = _notes(sides, different)
    left, right = sides.arms
    for name, memory in MEMORY_METRICS.items():
        readings = [memory.read(arm.artifact, arm.memory) for arm in (left, right)]
        if None in (readings[0].bytes, readings[1].bytes) or readings[0].probe != readings[1].probe:
            if not memory.device_only or result.workload.device != "cpu":
                notes.append(f"{name} is not compared: {readings[0]}, {readings[1]}")
            continue
        metrics[name] = compare_bytes(memory, sides)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        control=result.control if sides.paired else None,
        paired=sides.paired,
        n_pairs=len(sides.pairs),
        workload=result.workload,
        environment=result.environment,
        arms={baseline: summarise_arm(left), candidate: summarise_arm(right)},
        metrics=metrics,
        notes=tuple(notes),
        device=result.device,
        result=result if sides.paired else None,
    )


def _only_candidate(result: BenchmarkResult) -> str:
    names = result.candidates or [result.baseline]
    if len(names) > 1:
        raise ConfigError(f"the result has several candidates ({', '.join(names)}); one is compared; pass candidate=")
    return names[0]


def _differences(sides: Sides) -> list[str]:
    result, other = sides.result, sides.other
    work, work_other = result.workload.to_json(), other.workload.to_json()
    keys = [f"workload.{key}" for key in work | work_other if work.get(key) != work_other.get(key)]
    if result.vocab_size != other.vocab_size:
        keys.append("vocab_size")
    keys += [f"environment.{key}" for key in differing_keys(result.environment, other.environment)]
    left, right = sides.arms
    if left.artifact["precision"] != right.artifact["precision"]:
        keys.append("precision")
    return keys


def _notes(sides: Sides, different: Sequence[str]) -> list[str]:
    result, labels, (left, right) = sides.result, (sides.baseline, sides.candidate), sides.arms
    found = [unverified_note(label, arm.artifact) for label, arm in zip(labels, (left, right), strict=True)]
    notes = [note for note in found if note]  # first, because every number below them is of something unknown
    notes += [f"{key} differs between the arms and was allowed to" for key in different]
    if not sides.paired:
        notes.append("the arms come from two runs: drift between the runs is part of the ratio")
    if sides.paired and result.control is None:
        notes.append("no A/A control was run: the noise floor is unknown")
    if sides.paired and result.control is not None and labels[0] != result.baseline:
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
