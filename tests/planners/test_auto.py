"""The planner ``auto``: its dynamic program against every plan there is, its constraints, its swaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from planted import MODEL, planted_stats
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.evidence.statistics import GapDamage, gaps_of
from sglp_deploy.plan import make_plan
from sglp_deploy.planners.auto import CRITERION
from sglp_deploy.planners.budget import Budget
from sglp_deploy.planners.seam import FixedEvidence

N_LAYERS = 9


@dataclass(frozen=True)
class Measured(FixedEvidence):
    """Evidence whose damages after a repair are planted.

    Attributes:
        added: Of each gap, (L, longest).
        interaction: What each gap of a whole plan costs beyond the sum.
        asked: Plans that were judged, in order; shared by all views.
    """

    added: np.ndarray = field(default_factory=lambda: np.zeros((N_LAYERS, 1)))
    interaction: float = 0.0
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def gap_damage(self, longest: int, *, precision: str = "auto") -> GapDamage:
        """The planted ones."""
        added = self.added[:, :longest]
        return GapDamage(added, np.isfinite(added), 100)

    def damage_repaired(self, plans: Sequence[Sequence[int]], *, precision: str = "auto") -> list[float]:
        """The sum of the gaps, and something for the number of gaps that the sum does not know."""
        self.asked.extend(map(tuple, plans))
        return [self.sum_of(plan) + self.interaction * len(gaps_of(plan)) for plan in plans]

    def sum_of(self, drop: Sequence[int]) -> float:
        """The planted cost of a set of layers."""
        gaps = gaps_of(drop)
        if any(length > self.added.shape[1] for _, length in gaps):
            return float("inf")
        return float(sum(self.added[start, length - 1] for start, length in gaps))

    def view(self, groups: Sequence[Sequence[int]] = ()) -> Measured:
        """With other groups."""
        return replace(self, groups=tuple(map(tuple, groups)))


def measured(added: np.ndarray, interaction: float = 0.0, **stats: Any) -> Measured:
    """Evidence of nine layers in three segments."""
    return Measured(planted_stats((2, 3, 4), **stats), added=added, interaction=interaction)


def planted(seed: int = 0, longest: int = N_LAYERS) -> np.ndarray:
    """Random costs that grow with the gap; infinite beyond the last layer."""
    steps = np.random.default_rng(seed).gamma(2.0, 0.1, (N_LAYERS, longest))
    added = steps.cumsum(1)
    for start in range(N_LAYERS):
        added[start, N_LAYERS - start :] = np.inf
    return added


def cheapest(evidence: Measured, n_drop: int, allowed: Callable[[tuple[int, ...]], bool] = lambda drop: True) -> float:
    """The least cost over every plan there is."""
    return min(evidence.sum_of(drop) for drop in combinations(range(N_LAYERS), n_drop) if allowed(drop))


@pytest.mark.parametrize("n_drop", range(1, N_LAYERS))
@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_program_finds_the_cheapest_plan_there_is(seed: int, n_drop: int) -> None:
    evidence = measured(planted(seed))
    plan = make_plan(evidence, Budget(drop=n_drop), method="auto", model=MODEL, judged=0, longest=N_LAYERS)
    assert evidence.sum_of(plan.drop) == pytest.approx(cheapest(evidence, n_drop))
    assert plan.criterion == CRITERION
    np.testing.assert_allclose(plan.scores[CRITERION], evidence.added[:, 0])


def test_no_gap_is_longer_than_asked_for() -> None:
    added = planted(1)
    added[2:, :] += 5.0  # one long gap at the front would be the cheapest
    plan = make_plan(measured(added), Budget(drop=6), method="auto", model=MODEL, judged=0, longest=2)
    assert max(length for _, length in gaps_of(plan.drop)) <= 2


def test_layers_that_must_stay_stay() -> None:
    fixed = (True, False, True, True, False, True, True, True, True)
    evidence = measured(planted(2), prunable=fixed)
    plan = make_plan(evidence, Budget(drop=5), method="auto", model=MODEL, judged=0, longest=N_LAYERS)
    assert not {1, 4} & set(plan.drop)
    assert evidence.sum_of(plan.drop) == pytest.approx(cheapest(evidence, 5, lambda drop: not {1, 4} & set(drop)))


def test_every_segment_keeps_a_layer_when_asked_for() -> None:
    added = planted(3)
    added[2:5, :3] = 0.001  # the second segment of three would go whole
    added[3, 2] = added[4, 1:3] = 9.0
    free = make_plan(measured(added), Budget(drop=3), method="auto", model=MODEL, judged=0)
    bound = make_plan(measured(added), Budget(drop=3), method="auto", model=MODEL, judged=0, segments=True)
    assert free.drop == (2, 3, 4)
    assert len(bound.segments) == 3
    assert all(any(start <= layer < end for layer in bound.keep) for start, end in bound.segments)


def test_groups_go_together() -> None:
    groups = ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    plan = make_plan(measured(planted(4)), Budget(drop=3), method="auto", groups=groups, model=MODEL)
    assert plan.drop in groups


def test_a_budget_of_parameters_takes_the_fewest_layers_that_meet_it() -> None:
    evidence = measured(planted(5))
    total = int(evidence.parameters.sum()) + evidence.other_parameters
    plan = make_plan(evidence, Budget(max_parameters=total - 250), method="auto", model=MODEL, judged=0)
    assert len(plan.drop) == 3


def test_a_budget_no_gaps_can_meet_is_refused_with_what_can_be() -> None:
    with pytest.raises(PlanError, match=r"between 0 and 6 layers.*longest"):
        make_plan(measured(planted()), Budget(drop=8), method="auto", model=MODEL, longest=2)


def test_whole_plans_are_judged_and_the_better_neighbour_wins() -> None:
    # Alone, three gaps are a little cheaper than one; together each gap costs more than the sum knows.
    added = np.full((N_LAYERS, N_LAYERS), 5.0)
    added[:, 0] = 1.0
    added[[2, 4, 6], 0] = 0.10
    added[3, 0], added[[2, 3], 1], added[2, 2] = 0.2, 0.3, 0.4
    for start in range(N_LAYERS):
        added[start, N_LAYERS - start :] = np.inf
    alone = make_plan(measured(added), Budget(drop=2), method="auto", model=MODEL, judged=0)
    assert alone.drop == (2, 4)
    evidence = measured(added, interaction=0.5)
    judged = make_plan(evidence, Budget(drop=2), method="auto", model=MODEL, judged=12)
    assert judged.drop == (2, 3)
    assert 2 <= len(evidence.asked) <= 12
    assert len(set(evidence.asked)) == len(evidence.asked)


@pytest.mark.parametrize("wrong", [{"longest": 0}, {"judged": -1}])
def test_a_count_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        make_plan(measured(planted()), Budget(drop=2), method="auto", model=MODEL, options=wrong)


def test_statistics_taken_before_cannot_answer_and_say_so() -> None:
    with pytest.raises(PlanError, match="plan with the model"):
        make_plan(planted_stats(), Budget(drop=2), method="auto", model=MODEL)
