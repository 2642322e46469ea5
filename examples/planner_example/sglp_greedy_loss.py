"""The ``greedy-loss`` planner: remove the layer whose removal costs least, measure again, and go on."""

from __future__ import annotations

from dataclasses import dataclass

from sglp_deploy.errors import PlanError
from sglp_deploy.planners.budget import Budget
from sglp_deploy.planners.seam import Evidence, LayerDecision


@dataclass(frozen=True)
class GreedyLossOptions:
    """What a caller may ask.

    Attributes:
        protect_ends: Layers at either end that always stay.
    """

    protect_ends: int = 1


class GreedyLossPlanner:
    """Each round takes the loss without every candidate, on top of those that are gone already."""

    name = "greedy-loss"
    source = "Song et al., SLEB, arXiv:2402.09025"
    Options = GreedyLossOptions

    def decide(self, evidence: Evidence, budget: Budget, options: GreedyLossOptions) -> LayerDecision:
        """Decide which layers go."""
        n_layers, n_drop = evidence.n_layers, budget.n_drop(evidence.n_layers)
        if n_drop is None:
            raise PlanError(
                "greedy-loss counts layers; max_parameters says how many parameters stay; pass drop or keep"
            )
        ends = options.protect_ends
        candidates = {layer for layer in range(ends, n_layers - ends) if evidence.prunable[layer]}
        if n_drop > len(candidates):
            raise PlanError(
                f"drop={n_drop} exceeds the {len(candidates)} layers that may go; pass drop<={len(candidates)}"
            )
        gone: list[int] = []
        first = [evidence.loss_without((layer,)) for layer in range(n_layers)]
        for _ in range(n_drop):
            # Of equal losses the deeper layer goes: an error made late passes through fewer layers.
            cheapest = min(candidates, key=lambda layer: (evidence.loss_without((*gone, layer)), -layer))
            candidates.remove(cheapest)
            gone.append(cheapest)
        return LayerDecision(
            drop=tuple(gone),
            segments=((0, n_layers),),
            criterion="loss-without",
            scores={"loss-without": tuple(first)},
        )
