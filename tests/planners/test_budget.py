from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.planners.budget import Budget, kept, select_drops, select_drops_for_parameters

WHOLE = [(0, 6)]
FREE = [True] * 6


@pytest.mark.parametrize(
    ("asked", "n_layers", "expected"),
    [
        ({"drop": 6}, 30, 6),
        ({"drop": 0}, 30, 0),
        ({"keep": 24}, 30, 6),
        ({"keep": 30}, 30, 0),
        ({"drop": 0.2}, 30, 6),
        ({"drop": 0.29}, 100, 29),  # 0.29 * 100 is 28.999999999999996
        ({"drop": 0.25}, 30, 7),
        ({"max_parameters": 10}, 30, None),
    ],
)
def test_a_budget_counts_the_layers_to_remove(asked: dict[str, Any], n_layers: int, expected: int | None) -> None:
    assert Budget.parse(**asked).n_drop(n_layers) == expected


def test_a_float_is_a_share_and_a_whole_number_a_count() -> None:
    int64_4: Any = np.int64(4)
    assert Budget.parse(drop=0.5) == Budget(fraction=0.5)
    assert Budget.parse(drop=5) == Budget(drop=5)
    assert Budget.parse(keep=int64_4).to_json() == {"keep": 4}
    assert type(Budget.parse(keep=int64_4).keep) is int


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "the budget sets nothing; .*pass exactly one of drop, keep, max_parameters"),
        ({"drop": 1, "keep": 2}, "the budget sets drop and keep; .*pass exactly one"),
        ({"drop": 6.0}, r"drop=6\.0 is a float, so it is read as a share .*pass a whole number \(drop=6\)"),
        ({"drop": float("nan")}, "drop=nan is a float"),
        ({"drop": -1}, "drop=-1 is out of range; it counts from 0; pass drop>=0"),
        ({"keep": 0}, "keep=0 is out of range; it counts from 1; pass keep>=1"),
        ({"keep": True}, "keep=True is out of range"),
        ({"keep": 2.5}, "keep=2.5 is not a whole number"),
        ({"max_parameters": 0}, "max_parameters=0 is out of range"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget.parse(**asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop": 30}, "drop=30 removes all 30 layers; at least one must stay; pass drop<=29"),
        ({"keep": 31}, "keep=31 exceeds the model's 30 layers; a plan only removes; pass keep<=30"),
        ({"drop": 0.01}, r"drop=0.01 of 30 layers is less than one layer; .*pass drop>=0\.0334 or drop=1"),
    ],
)
def test_a_budget_the_model_cannot_meet_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Budget.parse(**asked).n_drop(30)


def test_the_smallest_share_a_message_offers_is_accepted() -> None:
    assert Budget.parse(drop=0.0334).n_drop(30) == 1


def test_the_lowest_scores_go_first() -> None:
    assert select_drops([5, 1, 4, 0, 3, 2], WHOLE, FREE, 3) == (3, 1, 5)


def test_of_equal_scores_the_deeper_layer_goes_first() -> None:
    assert select_drops([1, 1, 1, 0, 1, 1], WHOLE, FREE, 3) == (3, 5, 4)


def test_the_last_survivor_of_a_segment_is_skipped() -> None:
    assert select_drops([0, 1, 2, 3, 4, 5], [(0, 2), (2, 6)], FREE, 3) == (0, 2, 3)


def test_a_layer_that_may_not_go_stays_and_counts_as_a_survivor() -> None:
    assert select_drops([0, 1, 2, 3, 4, 5], [(0, 2), (2, 6)], [True, False, *FREE[2:]], 2) == (0, 2)
    assert select_drops([0, 1, 2, 3, 4, 5], [(0, 2), (2, 6)], [False, True, *FREE[2:]], 2) == (1, 2)


def test_proportional_quotas_follow_the_largest_remainder() -> None:
    # 5 removals over 3 + 4 + 5 layers: shares 1.25, 1.67, 2.08 -> 1, 2, 2.
    scores = np.arange(12)
    segments = [(0, 3), (3, 7), (7, 12)]
    assert select_drops(scores, segments, [True] * 12, 5, "proportional") == (0, 3, 4, 7, 8)
    assert select_drops(scores, segments, [True] * 12, 5, "global") == (0, 1, 3, 4, 5)


def test_of_equal_remainders_the_deeper_segment_gives_the_layer() -> None:
    assert select_drops([0, 1, 2, 3, 4, 5], [(0, 3), (3, 6)], FREE, 1, "proportional") == (3,)


def test_proportional_quotas_leave_a_survivor_and_pass_on_the_rest() -> None:
    assert select_drops([0, 1, 2, 3, 4, 5], [(0, 1), (1, 6)], FREE, 4, "proportional") == (1, 2, 3, 4)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_feasible_budget_is_met_and_no_other(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    ends = list(itertools.accumulate(sizes))
    segments = list(zip([0, *ends[:-1]], ends, strict=True))
    n_layers = ends[-1]
    prunable = data.draw(st.lists(st.booleans(), min_size=n_layers, max_size=n_layers))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=n_layers, max_size=n_layers))
    n_drop = data.draw(st.integers(0, n_layers))
    quota = data.draw(st.sampled_from(["global", "proportional"]))
    # Feasible at all?  Ask every subset of the right size.
    choices = [
        chosen
        for chosen in itertools.combinations([layer for layer in range(n_layers) if prunable[layer]], n_drop)
        if all(set(range(start, end)) - set(chosen) for start, end in segments)
    ]
    if not choices:
        with pytest.raises(PlanError, match="pass "):
            select_drops(scores, segments, prunable, n_drop, quota)
        return
    drops = select_drops(scores, segments, prunable, n_drop, quota)
    assert tuple(sorted(drops)) in choices
    if quota == "global":
        assert sum(scores[layer] for layer in drops) == min(sum(scores[layer] for layer in c) for c in choices)


@pytest.mark.parametrize(
    ("segments", "prunable", "n_drop", "message"),
    [
        (WHOLE, FREE, 6, "drop=6 removes all 6 layers; at least one must stay; pass drop<=5"),
        ([(i, i + 1) for i in range(6)], FREE, 3, "keep=3 is below the 6 segments .*; pass n_segments<=3 or keep>=6"),
        (WHOLE, [False, *FREE[1:5], False], 5, r"drop=5 exceeds the 4 layers that may be removed; layers \[0, 5\] may"),
        (
            [(0, 2), (2, 6)],
            [False, False, *FREE[2:]],
            4,
            r"drop=4 exceeds the 3 layers these 2 .*; pass drop<=3 or few",
        ),
        (WHOLE, FREE, -1, "drop=-1 is negative"),
    ],
)
def test_an_impossible_number_of_removals_says_what_is_possible(
    segments: list[tuple[int, int]], prunable: list[bool], n_drop: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        select_drops(range(6), segments, prunable, n_drop)


def test_an_unknown_quota_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown quota 'globl'; .*did you mean 'global'.* global, proportional"):
        select_drops(range(6), WHOLE, FREE, 1, "globl")


def for_parameters(limit: int, segments: list[tuple[int, int]] = WHOLE) -> tuple[int, ...]:
    parameters = np.array([10, 20, 30, 40, 50, 60])  # 210 in layers, 100 outside
    return select_drops_for_parameters(range(6), segments, FREE, parameters, 100, limit)


@pytest.mark.parametrize(
    ("limit", "expected"), [(310, ()), (309, (0,)), (300, (0,)), (299, (0, 1)), (160, (0, 1, 2, 3, 4))]
)
def test_layers_go_in_rank_order_until_the_parameters_fit(limit: int, expected: tuple[int, ...]) -> None:
    assert for_parameters(limit) == expected


def test_a_parameter_budget_out_of_reach_says_what_is_left() -> None:
    message = (
        "max_parameters=159 cannot be met; 100 lie outside the layers .*leaves 160 of 310; pass max_parameters>=160$"
    )
    with pytest.raises(PlanError, match=message):
        for_parameters(159)
    with pytest.raises(PlanError, match=r"the 2 segments stays, which leaves 190 of 310; .*>=190 or fewer segments"):
        for_parameters(160, [(0, 3), (3, 6)])


def test_what_is_kept_is_what_is_not_dropped() -> None:
    assert kept(5, (3, 1)) == (0, 2, 4)
