import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sglp_bench.judge.intervals import (
    hierarchical_bootstrap,
    percentiles,
    sign_flip_p,
    t_interval,
    t_quantile_975,
    welch_interval,
)

ITERATIONS = 5

# Quantile 0.975 of Student's t for 1 to 30 degrees of freedom (any statistics textbook).
TABLE = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def simulate(rng: np.random.Generator, trials: int, pairs: int, kind: str) -> NDArray[np.float64]:
    """Iteration times of one arm, (trials, pairs, iterations): process effects of 1 %, iteration noise of 2 %."""
    process = rng.normal(0, 0.01, (trials, pairs)) if kind == "normal" else rng.exponential(0.01, (trials, pairs))
    if kind == "outliers":
        process += (rng.random((trials, pairs)) < 0.1) * 0.05
    noise = rng.normal(0, 0.02, (trials, pairs, ITERATIONS))
    spikes = (rng.random(noise.shape) < 0.1) * rng.exponential(0.2, noise.shape)
    return np.exp(process[..., None] + noise + spikes)


@pytest.mark.parametrize("kind", ["normal", "skewed", "outliers"])
@pytest.mark.parametrize("pairs", [4, 6, 10])
def test_the_t_interval_covers_the_truth_as_often_as_it_says(kind: str, pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    trials, truth = 1500, math.log(1.2)
    left = simulate(rng, trials, pairs, kind) * 1.2
    right = simulate(rng, trials, pairs, kind)
    logs = np.log(np.median(left, axis=2)) - np.log(np.median(right, axis=2))
    intervals = [t_interval(row) for row in logs]
    covered = np.mean([low <= truth <= high for low, high in (found for found in intervals if found)])
    assert len(intervals) == trials
    assert 0.93 <= covered <= 0.985


def test_the_bootstrap_of_pairs_alone_is_too_narrow_and_the_hierarchical_one_errs_to_the_safe_side() -> None:
    rng = np.random.default_rng(1)
    trials = 250
    left, right = simulate(rng, trials, 4, "normal"), simulate(rng, trials, 4, "normal")

    def coverage(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        found = [hierarchical_bootstrap(x, y, resamples=400, seed=3) for x, y in zip(a, b, strict=True)]
        return float(np.mean([low <= 0 <= high for low, high in found]))

    medians = [np.median(side, axis=2, keepdims=True) for side in (left, right)]
    assert coverage(medians[0], medians[1]) < 0.90  # one iteration per block: only pairs are resampled
    assert coverage(left, right) > 0.95


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # NIST/SEMATECH e-Handbook, table of critical values of Student's t, column 0.975.
    [(1, 12.706), (3, 3.182), (10, 2.228), (30, 2.042), (31, 2.040), (40, 2.021), (60, 2.000), (100, 1.984)],
)
def test_t_quantiles_agree_with_the_printed_table(degrees: int, expected: float) -> None:
    assert t_quantile_975(degrees) == pytest.approx(expected, abs=6e-4)


def test_fractional_degrees_round_down_and_none_below_one_exist() -> None:
    assert t_quantile_975(3.9) == t_quantile_975(3)
    with pytest.raises(ValueError, match="below 1"):
        t_quantile_975(0.5)


def test_one_pair_has_no_interval() -> None:
    assert t_interval(np.array([0.1])) is None
    assert welch_interval(np.array([0.1]), np.array([0.1, 0.2])) is None


def test_t_interval_of_a_worked_example() -> None:
    # mean 3, sd sqrt(2.5), n 5, t(4) 2.7764: 3 +- 1.9632
    assert t_interval(np.array([1.0, 2, 3, 4, 5])) == pytest.approx((1.0368, 4.9632), abs=1e-4)


def test_welch_interval_of_a_worked_example() -> None:
    # variances 1 and 4 over n 3: s.e. sqrt(5/3), degrees (5/3)^2 / ((1/3)^2/2 + (4/3)^2/2) = 2.94 -> 2, t 4.3027
    half = 4.3027 * math.sqrt(5 / 3)
    found = welch_interval(np.array([4.0, 5, 6]), np.array([1.0, 3, 5]))
    assert found == pytest.approx((2 - half, 2 + half), abs=1e-4)
    assert welch_interval(np.array([2.0, 2]), np.array([1.0, 1])) == (1.0, 1.0)


def test_sign_flip_p_of_pairs_that_all_agree_is_two_in_two_to_the_n() -> None:
    assert sign_flip_p(np.array([0.1, 0.2, 0.3, 0.4])) == 2 / 2**4
    assert sign_flip_p(np.array([0.1, -0.1, 0.1, -0.1])) == 1.0


def test_sign_flip_p_by_drawing_agrees_with_the_exact_tail() -> None:
    # 16 equal pairs, 12 positive: P(|sum| >= 8) for fair signs = 2 * P(Bin(16, 1/2) >= 12)
    exact = 2 * sum(math.comb(16, k) for k in range(12, 17)) / 2**16
    values = np.array([0.1] * 14 + [-0.1] * 2)
    exact_14 = 2 * sum(math.comb(16, k) for k in range(14, 17)) / 2**16
    assert sign_flip_p(np.array([0.1] * 12 + [-0.1] * 4)) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(values) == pytest.approx(exact_14, abs=0.003)


def test_the_bootstrap_is_seeded_and_unpaired_arms_may_differ_in_length() -> None:
    rng = np.random.default_rng(0)
    left, right = simulate(rng, 1, 6, "normal")[0] * 1.5, simulate(rng, 1, 4, "normal")[0]
    first = hierarchical_bootstrap(left, right, paired=False, resamples=500, seed=1)
    assert first == hierarchical_bootstrap(left, right, paired=False, resamples=500, seed=1)
    assert first[0] < math.log(1.5) < first[1]
    assert first[0] > math.log(1.3)


@pytest.mark.parametrize(("count", "given"), [(7, 0), (8, 1), (45, 1), (46, 2), (93, 3), (472, 3), (473, 4)])
def test_percentiles_are_withheld_below_their_minimum_count(count: int, given: int) -> None:
    found = percentiles(np.arange(1.0, count + 1))
    assert [entry["value"] is not None for entry in found.values()] == [True] * given + [False] * (4 - given)
    assert list(found) == ["p50", "p90", "p95", "p99"]


def test_a_withheld_percentile_says_how_many_samples_it_needs() -> None:
    assert percentiles([1.0] * 45)["p90"]["reason"] == "n too small: 45 samples, p90 needs 46"
    assert percentiles(np.arange(101.0))["p90"] == {"value": 90.0, "reason": None}


def test_the_t_quantile_is_that_of_the_printed_tables_to_every_digit() -> None:
    assert [round(t_quantile_975(degrees), 4) for degrees in range(1, 31)] == list(TABLE)
