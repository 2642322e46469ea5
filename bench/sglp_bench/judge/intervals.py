"""How sure a ratio is: intervals and tests over pairs of blocks, chosen by simulation and not by habit.

The interval is Student's t over the log-ratios of the pairs, for every number of pairs.  In simulation (two arms,
between-process and within-process noise, normal, skewed and outlier-prone; 600 trials each; repeated in small by
``tests/bench/judge/test_intervals.py``) a nominal 95 % interval covered the truth in this share of trials:

========================  =========  =========  =========
method                     4 pairs    6 pairs   10 pairs
========================  =========  =========  =========
t over pairs              .95 - .97  .94 - .96  .95 - .97
bootstrap of pairs only   .78 - .83  .83 - .88  .87 - .91
bootstrap, hierarchical   .98 - 1.0  .98 - 1.0  .99 - 1.0
bootstrap-t               .93 - .95  .94 - .96  .92 - .96
========================  =========  =========  =========

The percentile bootstrap of pairs is too narrow.  The hierarchical one (pairs, then iterations inside blocks) counts the
iteration noise twice, since it is already in the spread between pairs.  It errs to the safe side, at one and a half to
three times the width.  It is kept beside the t interval as a second view.  Bootstrap-t covers.  But at 4 pairs a
resample of equal pairs makes it hundreds of per cent wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Fewest samples for a percentile at 95 % confidence with one sample beyond it (MLPerf LoadGen's early-stopping bound).
MINIMUM_SAMPLES = {50: 8, 90: 46, 95: 93, 99: 473}

_EXACT_PAIRS = 13  # 8,192 sign patterns; beyond it they are drawn
_CHUNK = 2_000_000  # floats per resampling step: 16 MB


def t_quantile_975(degrees: float) -> float:
    """The 0.975 quantile of Student's t; fractional degrees of freedom are rounded down (wider, so safe)."""
    from scipy import stats  # here: 73 MiB that must not stand in a worker's memory reading

    whole = int(degrees)
    if whole < 1:
        raise ValueError(f"degrees={degrees} is below 1")
    return float(stats.t.ppf(0.975, whole))


def t_interval(log_ratios: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of the mean of paired log-ratios, shape (pairs,); None for fewer than two pairs."""
    count = len(log_ratios)
    if count < 2:
        return None
    half = t_quantile_975(count - 1) * float(log_ratios.std(ddof=1)) / math.sqrt(count)
    mean = float(log_ratios.mean())
    return mean - half, mean + half


def welch_interval(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, float] | None:
    """95 % interval of ``mean(left) - mean(right)`` for unpaired samples of unequal spread (Welch); None below two."""
    if min(len(left), len(right)) < 2:
        return None
    a, b = float(left.var(ddof=1)) / len(left), float(right.var(ddof=1)) / len(right)
    mean = float(left.mean() - right.mean())
    if a + b == 0:
        return mean, mean
    degrees = (a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1))
    half = t_quantile_975(max(degrees, 1.0)) * math.sqrt(a + b)
    return mean - half, mean + half


def hierarchical_bootstrap(
    left: NDArray[np.float64],
    right: NDArray[np.float64],
    *,
    paired: bool = True,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of the mean log-ratio of block medians, resampling blocks and then iterations.

    Args:
        left: Iteration values, shape (blocks, iterations).
        right: The same for the other arm; with ``paired`` row i belongs to row i of ``left``.
        paired: Draw the same blocks on both sides.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Returns:
        Lower and upper end of ``mean(log(median(left))) - mean(log(median(right)))``.
    """
    rng = np.random.default_rng(seed)
    widest = max(left.size, right.size)
    step = max(1, _CHUNK // widest)
    means = []
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        rows = rng.integers(0, len(left), (count, len(left)))
        other = rows if paired else rng.integers(0, len(right), (count, len(right)))
        means.append(_resampled_mean(rng, left, rows) - _resampled_mean(rng, right, other))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


def sign_flip_p(log_ratios: NDArray[np.float64], *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided permutation p-value of "no difference": the signs of the pairs are exchangeable.

    Exact up to 13 pairs, drawn beyond.  With n pairs it cannot fall below ``2 / 2**n``: four pairs never give less
    than 0.125, so it is a second view and not the verdict.
    """
    count = len(log_ratios)
    if count <= _EXACT_PAIRS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
    else:
        rng = np.random.default_rng(seed)
        signs = np.vstack([np.ones((1, count)), rng.choice((-1.0, 1.0), (resamples, count))])
    observed = abs(float(log_ratios.mean()))
    flipped = np.abs(signs @ log_ratios) / count
    return float(np.mean(flipped >= observed - 1e-12))


def percentiles(samples: Sequence[float] | NDArray[np.float64]) -> dict[str, dict[str, Any]]:
    """The percentiles these samples can support: ``{"p50": {"value", "reason"}, ...}``.

    A percentile with fewer samples than :data:`MINIMUM_SAMPLES` has the value None and a reason; numpy's linear
    interpolation otherwise.
    """
    values = np.asarray(samples, dtype=np.float64)
    return {
        f"p{rank}": {"value": float(np.percentile(values, rank)), "reason": None}
        if len(values) >= least
        else {"value": None, "reason": f"n too small: {len(values)} samples, p{rank} needs {least}"}
        for rank, least in MINIMUM_SAMPLES.items()
    }


def _resampled_mean(
    rng: np.random.Generator, values: NDArray[np.float64], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    inner = rng.integers(0, values.shape[1], (*rows.shape, values.shape[1]))
    medians = np.median(values[rows[..., None], inner], axis=2)
    return np.asarray(np.log(medians).mean(axis=1))
