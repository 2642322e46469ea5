"""What models got on the items of a task, and what may be said of it: means, paired differences, their intervals.

Items of a task are few and their difficulty varies a lot.  Two models answer the same items, so their difference is
taken item by item, and its interval is much narrower than those of the two means suggest.  All intervals are percentile
bootstraps over items.  Where every item comes out the same an interval has no width, which says nothing about other
items: few items and no disagreement are no proof that there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import CalibrationError

_RESAMPLES = 2_000
_CHUNK = 2_000_000  # items drawn at a time: 16 MB


@dataclass(frozen=True)
class Scores:
    """What one model got.

    Attributes:
        values: Metric name to a value for each item (items), the first metric being the one that is quoted.
        labels: What a reader calls each metric.
        facts: What the task is: ``kind``, ``source``, ``digest`` and what else a reader should know of it.
        lower_is_better: Metrics of which less is better.
    """

    values: Mapping[str, NDArray[np.float64]]
    labels: Mapping[str, str]
    facts: Mapping[str, Any]
    lower_is_better: frozenset[str] = field(default_factory=frozenset)

    @property
    def metric(self) -> str:
        """The one that is quoted."""
        return next(iter(self.values))

    @property
    def n_items(self) -> int:
        """Items of the task."""
        return len(self.values[self.metric])


def alone(scores: Scores, *, seed: int = 0) -> dict[str, Any]:
    """One model's figures, each a mean with its 95 % interval."""
    metrics = {
        name: {**_about(scores, name), **_mean(values, _draws(len(values), seed))}
        for name, values in scores.values.items()
    }
    return {**_head(scores), "metrics": metrics, "by_item": {"model": _by_item(scores)}}


def paired(dense: Scores, pruned: Scores, *, seed: int = 0) -> dict[str, Any]:
    """Both models' figures, and pruned minus dense and pruned over dense over the same items, with 95 % intervals.

    The ratio's interval is None where the dense model's mean is zero in a resample.

    Raises:
        CalibrationError: If they were not taken on the same items.
    """
    metrics = {}
    for name, base in dense.values.items():
        other = pruned.values.get(name)
        if other is None or len(other) != len(base):
            raise CalibrationError(
                f"the dense model has {len(base)} values of {name}, the pruned one "
                f"{'none' if other is None else len(other)}; a difference needs the same items; judge both by one file"
            )
        draws = _draws(len(base), seed)
        means = draws(base), draws(other)
        mean = float(base.mean())
        sound = bool((means[0] > 0).all()) and mean > 0
        metrics[name] = {
            **_about(dense, name),
            "dense": _mean(base, draws),
            "pruned": _mean(other, draws),
            "difference": float((other - base).mean()),
            "difference_interval": _quantiles(means[1] - means[0]),
            "ratio": float(other.mean()) / mean if mean > 0 else None,
            "ratio_interval": _quantiles(means[1] / means[0]) if sound else None,
        }
    return {**_head(dense), "metrics": metrics, "by_item": {"dense": _by_item(dense), "pruned": _by_item(pruned)}}


def _head(scores: Scores) -> dict[str, Any]:
    return {**scores.facts, "n_items": scores.n_items, "metric": scores.metric}


def _about(scores: Scores, name: str) -> dict[str, Any]:
    return {"label": scores.labels[name], "higher_is_better": name not in scores.lower_is_better}


def _mean(values: NDArray[np.float64], draws: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> dict[str, Any]:
    return {"value": float(values.mean()), "interval": _quantiles(draws(values))}


def _draws(count: int, seed: int) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Means of resamples; the same items are drawn for every array of values that is passed."""
    step = max(1, _CHUNK // count)

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        rng = np.random.default_rng(seed)
        return np.concatenate(
            [
                values[rng.integers(0, count, (min(step, _RESAMPLES - start), count))].mean(1)
                for start in range(0, _RESAMPLES, step)
            ]
        )

    return means


def _quantiles(means: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def _by_item(scores: Scores) -> dict[str, list[float]]:
    return {
        name: [int(value) if value.is_integer() else value for value in map(float, values)]
        for name, values in scores.values.items()
    }
