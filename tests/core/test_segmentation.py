from __future__ import annotations

import itertools

import numpy as np
import pytest
import ruptures
from hypothesis import given, settings
from hypothesis import strategies as st

from planted import block_matrix
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.segmentation import Segmentation, choose_n_segments, fisher_segmentation, loss_curve
from sglp_deploy.similarity import SimilarityMatrix

# The example of R's Fisher-optimal-partition documentation; the losses below are worked by hand.
TEXTBOOK = [9.3, 1.8, 1.9, 1.7, 1.5, 1.3, 1.4, 2.0, 1.9, 2.3, 2.1]


def scatter(profile: np.ndarray, boundaries: tuple[int, ...]) -> float:
    """Summed squared distance to each segment's mean, straight from its definition."""
    return sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in np.split(profile, boundaries[1:-1]))


def every_cut(n_layers: int, n_segments: int) -> list[tuple[int, ...]]:
    return [(0, *cuts, n_layers) for cuts in itertools.combinations(range(1, n_layers), n_segments - 1)]


@pytest.mark.parametrize(
    ("n_segments", "boundaries", "loss"),
    [(2, (0, 1, 11), 0.909), (3, (0, 1, 7, 11), 0.3675), (4, (0, 1, 4, 7, 11), 0.1275)],
)
def test_the_textbook_series_is_cut_as_by_hand(n_segments: int, boundaries: tuple[int, ...], loss: float) -> None:
    found = fisher_segmentation(TEXTBOOK, n_segments)
    assert found.boundaries == boundaries
    assert found.loss == pytest.approx(loss, abs=1e-12)
    assert (found.n_segments, found.n_layers, found.profile) == (n_segments, 11, "given")


profiles = st.integers(1, 10).flatmap(
    lambda n: st.integers(1, 3).flatmap(
        lambda d: st.lists(
            st.lists(st.floats(-100, 100, allow_subnormal=False, width=32), min_size=d, max_size=d),
            min_size=n,
            max_size=n,
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(rows=profiles, data=st.data())
def test_no_other_cut_is_better(rows: list[list[float]], data: st.DataObject) -> None:
    profile = np.asarray(rows)
    n_segments = data.draw(st.integers(1, len(profile)))
    found = fisher_segmentation(profile, n_segments)
    best = min(scatter(profile, cut) for cut in every_cut(len(profile), n_segments))
    slack = 1e-9 * scatter(profile, (0, len(profile))) + 1e-18
    assert found.loss == pytest.approx(best, rel=1e-9, abs=slack)
    assert scatter(profile, found.boundaries) == pytest.approx(best, rel=1e-9, abs=slack)
    assert all(after <= before + slack for before, after in itertools.pairwise(found.losses))
    assert found.losses[-1] == 0.0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("width", [1, 5])
def test_ruptures_finds_the_same_loss(seed: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    n_layers = 24
    profile = generator.normal(size=(n_layers, width)).cumsum(axis=0)
    n_segments = int(generator.integers(2, 8))
    ends = ruptures.Dynp(model="l2", min_size=1, jump=1).fit(profile).predict(n_bkps=n_segments - 1)
    found = fisher_segmentation(profile if width > 1 else profile[:, 0], n_segments)
    assert found.loss == pytest.approx(scatter(profile, (0, *ends)), rel=1e-9)
    assert found.boundaries == (0, *ends)  # random walks have no ties


def test_ties_go_to_the_earliest_cut() -> None:
    assert fisher_segmentation([1.0, 0.0, 0.0, 1.0], 2).boundaries == (0, 1, 4)
    assert fisher_segmentation([0.1, 0.0, 0.0, 0.0, 0.1], 2).boundaries == (0, 1, 5)
    assert fisher_segmentation([7.0] * 5, 3).boundaries == (0, 1, 2, 5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_scaling_and_shifting_the_profile_leaves_the_cuts(seed: int, scale: float, shift: float) -> None:
    profile = np.random.default_rng(seed).normal(size=15)
    assert fisher_segmentation(scale * profile + shift, 4).boundaries == fisher_segmentation(profile, 4).boundaries


def test_a_planted_profile_is_recovered_beside_a_huge_jump() -> None:
    # Differences of prefix sums lose the steps of 1e-3 next to the jump of 1e6.
    levels, sizes = [1e6, 0.0, 0.001, 0.0, 0.002], [3, 4, 5, 2, 6]
    profile = np.repeat(levels, sizes)
    found = fisher_segmentation(profile, 5)
    assert found.boundaries == (0, 3, 7, 12, 14, 20)
    assert found.loss == 0.0
    assert found.segments == ((0, 3), (3, 7), (7, 12), (12, 14), (14, 20))
    assert found.losses[3] == pytest.approx(1e-6 * 5 * 2 / 7, rel=1e-6)  # the cheapest merger: five of 0.001, two of 0


def test_groups_of_layers_are_found_in_a_similarity_matrix() -> None:
    matrix = SimilarityMatrix(block_matrix((2, 4, 6)), "unbiased")
    for kind in ("row_sum", "rows"):
        found = fisher_segmentation(matrix, 3, kind=kind)
        assert found.boundaries == (0, 2, 6, 12)
        assert found.profile == kind


def test_row_sums_cannot_tell_groups_of_equal_size_apart_but_rows_can() -> None:
    matrix = SimilarityMatrix(block_matrix((4, 4, 4)), "unbiased")
    assert choose_n_segments(loss_curve(matrix), 12) == 1
    assert fisher_segmentation(matrix, 3, kind="rows").boundaries == (0, 4, 8, 12)


def test_a_profile_flat_up_to_rounding_counts_as_flat() -> None:
    ragged = 0.3 * np.ones(8)
    ragged[::2] += np.spacing(0.3)
    curve = loss_curve(ragged)
    assert curve.tolist() == [0.0] * 8
    assert choose_n_segments(curve, 8) == 1


def test_the_loss_curve_is_what_each_segmentation_carries() -> None:
    profile = np.random.default_rng(3).normal(size=9)
    curve = loss_curve(profile)
    assert loss_curve(profile, 4).tolist() == curve[:4].tolist()
    for k in range(1, 10):
        found = fisher_segmentation(profile, k)
        assert found.losses == tuple(curve)
        assert found.loss == curve[k - 1]


@pytest.mark.parametrize(
    ("curve", "limit", "threshold", "expected"),
    [
        ([100.0, 40.0, 5.0, 1.0], 4, 0.05, 3),
        ([100.0, 40.0, 5.1, 1.0], 4, 0.05, 4),
        ([100.0, 40.0, 5.0, 1.0], 2, 0.05, 2),
        ([100.0, 40.0, 5.0, 1.0], 4, 0.5, 2),
        ([0.0, 0.0, 0.0], 3, 0.05, 1),
        ([10.0, 9.0], 5, 0.05, 2),
    ],
)
def test_k_is_the_least_that_leaves_five_percent(
    curve: list[float], limit: int, threshold: float, expected: int
) -> None:
    assert choose_n_segments(curve, limit, threshold) == expected


def test_choosing_k_from_nothing_lists_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_n_segments([], 0, 1.5)
    assert len(caught.value.faults) == 3
    assert "curve is empty" in caught.value.faults[0]
    assert "limit=0 leaves no segment; a plan has at least one; pass limit>=1" in caught.value.faults[1]
    assert "threshold=1.5 is no share" in caught.value.faults[2]


@pytest.mark.parametrize("n_segments", [0, -1, 5])
def test_a_number_of_segments_out_of_range_is_refused(n_segments: int) -> None:
    message = rf"n_segments={n_segments} is outside 1\.\.4; .*pass 1 <= n_segments <= 4"
    with pytest.raises(PlanError, match=message):
        fisher_segmentation([1.0, 2.0, 3.0, 4.0], n_segments)


def test_an_unusable_profile_is_refused() -> None:
    with pytest.raises(PlanError, match="the profile of layer 1 is not finite"):
        fisher_segmentation([1.0, np.nan], 1)
    with pytest.raises(PlanError, match=r"the profile has shape \(0,\); .*pass \(L,\) or \(L, d\)"):
        loss_curve([])
    with pytest.raises(PlanError, match=r"max_segments=3 is outside 1\.\.2"):
        loss_curve([1.0, 2.0], 3)
    with pytest.raises(ConfigError, match=r"unknown profile 'row-sum'; .*did you mean 'row_sum'"):
        fisher_segmentation([1.0, 2.0], 1, kind="row-sum")


@pytest.mark.parametrize(
    ("boundaries", "loss", "losses", "fault"),
    [
        ((0, 2), 2.0, (2.0, 1.0, 0.0), "do not run from 0 to the 3 layers"),
        ((1, 3), 2.0, (2.0, 1.0, 0.0), "do not run from 0"),
        ((0, 2, 2, 3), 0.0, (2.0, 1.0, 0.0), "do not rise"),
        ((0, 3), 2.0, (2.0, 3.0, 0.0), "the loss curve rises"),
        ((0, 3), -1.0, (-1.0, -1.0, -1.0), "negative or non-finite"),
        ((0, 1, 3), 2.0, (2.0, 1.0, 0.0), "loss 2.0 is not the curve's value for 2 segments"),
    ],
)
def test_a_segmentation_that_contradicts_itself_is_refused(
    boundaries: tuple[int, ...], loss: float, losses: tuple[float, ...], fault: str
) -> None:
    with pytest.raises(PlanError, match=f"{fault}.*; make it with fisher_segmentation"):
        Segmentation(boundaries, loss, losses, "given")
