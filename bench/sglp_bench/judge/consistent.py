"""A comparison that was read from a file, held against the raw samples beside it: no figure in it is believed."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from sglp_bench.judge.ceiling import fraction_of_ceiling, gain_fraction
from sglp_bench.judge.compare import Comparison, compare_results
from sglp_bench.judge.ratio import MetricComparison, judge
from sglp_bench.result import BenchmarkResult
from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError

_ABOUT = ("workload", "device", "environment", "arms", "control", "n_pairs")
# Another release of numpy may round the last digits otherwise; intervals once came from a table of four digits.
_CLOSE = {"ratio": 1e-9, "baseline": 1e-9, "candidate": 1e-9, "pair_ratios": 1e-9, "interval": 2e-3, "control": 2e-3}


def refuse_contradiction(comparison: Comparison, result: BenchmarkResult) -> None:
    """Compare ``comparison`` with what its raw samples give.

    Args:
        comparison: Of two arms of ``result``, as it was read.
        result: The raw samples.

    Raises:
        ArtifactError: If they give another figure, or it is of other samples.
        BenchmarkError: If they give none.
    """
    labels = {comparison.baseline, comparison.candidate}
    if not comparison.paired or not labels <= set(result.arms):
        raise _changed(f"the comparison of {' and '.join(sorted(labels))} is not one of the raw result beside it")
    # The bootstrap is a second view that no verdict rests on, and the only part that takes time.
    again = compare_results(
        result, baseline=comparison.baseline, candidate=comparison.candidate, allow=("precision",), resamples=2
    )
    said, is_so = comparison.to_json(), again.to_json()
    for key in _ABOUT:
        if _io.plain(said[key]) != _io.plain(is_so[key]):
            raise _changed(f"the comparison's {key.replace('_', ' ')} is not that of its raw result")
    for name, metric in comparison.metrics.items():
        if name not in again.metrics:
            raise _changed(f"the comparison has {name}, and its raw samples give none")
        _refuse_other_figures(name, metric, again.metrics[name], comparison.candidate)


def _refuse_other_figures(name: str, metric: MetricComparison, found: MetricComparison, candidate: str) -> None:
    for key, tolerance in _CLOSE.items():
        said, is_so = getattr(metric, key), getattr(found, key)
        if not _is_close(said, is_so, tolerance):
            raise _changed(
                f"the comparison says {key.replace('_', ' ')} {said} of {name}, its raw samples give {is_so}"
            )
    verdicts = [(found.verdict, found.resolved)]
    if metric.interval is not None:  # of a figure at the edge, what its own digits say
        floor = None if metric.control is None else metric.control.noise_floor
        verdicts.append(judge(metric.ratio, metric.interval, floor, candidate=candidate)[:2])
    if (metric.verdict, metric.resolved) not in verdicts:
        raise _changed(f"the comparison calls {name} {metric.verdict}, and by its figures it is {verdicts[0][0]}")
    if metric.ceiling is not None:
        shares = (fraction_of_ceiling(metric.ratio, metric.ceiling), gain_fraction(metric.ratio, metric.ceiling))
        if not _is_close((metric.fraction_of_ceiling, metric.gain_fraction), shares, 1e-9):
            raise _changed(f"the comparison's share of the ceiling of {name} is not what its ratio gives")


def _changed(what: str) -> ArtifactError:
    return ArtifactError(f"{what}; one of the two files was changed; measure again")


def _is_close(one: Any, other: Any, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_is_close(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    return _is_close(tuple(asdict(one).values()), tuple(asdict(other).values()), tolerance)
