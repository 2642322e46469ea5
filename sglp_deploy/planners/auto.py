"""Auto: every gap repaired and judged, the least harmful set of gaps by dynamic programming, then swaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from sglp_deploy._names import precision_faults
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.evidence.statistics import gaps_of
from sglp_deploy.planners.budget import Budget
from sglp_deploy.planners.seam import Evidence, LayerDecision
from sglp_deploy.planners.sglp import segments_of

CRITERION = "divergence-after-repair"


@dataclass(frozen=True)
class AutoOptions:
    """What a caller may ask of the planner.

    Attributes:
        longest: Layers in one gap, at most.
        judged: Whole plans that are repaired and judged after the dynamic programming, at most; 0 takes its answer.
        segments: Whether every segment that SGLP finds keeps a layer.
        precision: What the model's matrices are multiplied in: "fp32", "bf16", or "auto" (bf16 where the processor
            multiplies it).

    Raises:
        ConfigError: If a number is out of range, or the precision unknown.
    """

    longest: int = 8
    judged: int = 12
    segments: bool = False
    precision: str = "auto"

    def __post_init__(self) -> None:
        faults = [
            f"{name}={getattr(self, name)} must be at least {least}; it counts; pass {least} or more"
            for name, least in (("longest", 1), ("judged", 0))
            if getattr(self, name) < least
        ]
        faults += precision_faults(self.precision)
        if faults:
            raise ConfigError(faults)


class AutoPlanner:
    """Chooses by what is left of the damage after a repair, and not by what a layer does.

    1. For every gap of consecutive layers, the MLP before it is fitted in closed form to the unpruned stream behind it.
       Its damage is how far the predictions then diverge from the unpruned model's, on rows that nothing was fitted on.
    2. Damages are taken to sum up.  Then the best set of gaps for any number of layers is an exact
       dynamic program over the boundaries.
    3. They do not quite sum up.  So the plan and its nearest neighbours (one layer exchanged, in the order of the sum)
       are repaired as a whole, from shallow to deep, and judged; the best is gone on from while the number allows.

    Source: this project (docs/method.md).  Compare LLM-Streamline (arXiv:2403.19135), which replaces one
    contiguous block.
    """

    name = "auto"
    source = "this project (docs/method.md#auto)"
    Options = AutoOptions

    def decide(self, evidence: Evidence, budget: Budget, options: AutoOptions) -> LayerDecision:
        """See :class:`sglp_deploy.planners.seam.Planner`."""
        n_layers = evidence.n_layers
        wanted = budget.n_drop(n_layers)
        segments = segments_of(evidence) if options.segments else ((0, n_layers),)
        most = n_layers - 1 if wanted is None else wanted
        longest = max(1, min(options.longest, most))
        if evidence.groups:
            longest = max(longest, *(len(group) for group in evidence.groups))
        started = perf_counter()
        gaps = evidence.gap_damage(longest, precision=options.precision)
        measured = perf_counter()
        costs = _Costs(gaps.values, evidence, segments)
        drop = costs.cheapest(wanted, budget.max_parameters)
        programmed = perf_counter()
        drop = _with_swaps(drop, costs, evidence, budget.max_parameters, options)
        swapped = perf_counter()
        alone = gaps.values[:, 0]
        return LayerDecision(
            drop=drop,
            segments=segments,
            criterion=CRITERION,
            scores={CRITERION: tuple(float(value) for value in alone)},
            elapsed_s={
                "gaps": measured - started,
                "dynamic programming": programmed - measured,
                "swaps": swapped - programmed,
            },
        )


class _Costs:
    """What a set of removed layers costs, as the sum over its gaps; infinite where it may not be.

    Args:
        added: Nats by first layer and length - 1, (L, longest).
        evidence: Which layers may go, and which only together.
        segments: Each keeps a layer.
    """

    def __init__(self, added: NDArray[np.float64], evidence: Evidence, segments: Sequence[tuple[int, int]]) -> None:
        self.n_layers, self.longest = added.shape
        self._evidence = evidence
        groups = {layer: frozenset(group) for group in evidence.groups for layer in group}
        self._added = added.copy()
        for start in range(self.n_layers):
            for column in range(self.longest):
                layers = frozenset(range(start, start + column + 1))
                fixed = any(layer >= self.n_layers or not evidence.prunable[layer] for layer in layers)
                torn = bool(groups) and any(not groups.get(layer, layers | {-1}) <= layers for layer in layers)
                emptied = any(layers.issuperset(range(first, end)) for first, end in segments)
                if fixed or torn or emptied:
                    self._added[start, column] = np.inf

    def of(self, drop: Sequence[int]) -> float:
        """Nats that removing these layers adds."""
        return float(sum(self._gap(start, length) for start, length in gaps_of(drop)))

    def cheapest(self, n_drop: int | None, max_parameters: int | None) -> tuple[int, ...]:
        """The cheapest layers for a budget, exactly, by dynamic programming over the boundaries.

        Raises:
            PlanError: If no set of gaps meets it.
        """
        most = self.n_layers - 1 if n_drop is None else n_drop
        table = self._table(most)
        counts = range(most + 1) if n_drop is None else (n_drop,)
        for count in counts:
            drop = self._read(table, count)
            if drop is not None and (max_parameters is None or self._parameters(drop) <= max_parameters):
                return drop
        reached = [count for count in range(most + 1) if self._read(table, count) is not None]
        raise PlanError(
            f"no plan with gaps of at most {self.longest} layers meets the budget; between {reached[0]} and "
            f"{reached[-1]} layers can go; ask for fewer, raise the planner's option 'longest', or leave 'segments' out"
        )

    def fits(self, drop: Sequence[int], max_parameters: int | None) -> bool:
        """Whether these layers may go together and meet a budget of parameters."""
        return np.isfinite(self.of(drop)) and (max_parameters is None or self._parameters(drop) <= max_parameters)

    def _gap(self, start: int, length: int) -> float:
        return float(self._added[start, length - 1]) if length <= self.longest else float("inf")

    def _parameters(self, drop: Sequence[int]) -> int:
        sizes = self._evidence.parameters
        return int(sizes.sum()) + self._evidence.other_parameters - int(sizes[list(drop)].sum())

    def _table(self, most: int) -> list[list[list[tuple[float, int]]]]:
        """By boundary, layers removed before it and whether a gap ends there: cost, and the length of that gap."""
        nothing = (float("inf"), 0)
        table = [[[nothing, nothing] for _ in range(most + 1)] for _ in range(self.n_layers + 1)]
        table[0][0][0] = (0.0, 0)
        for end in range(1, self.n_layers + 1):
            for count in range(most + 1):
                kept = min(table[end - 1][count], key=lambda each: each[0])
                table[end][count][0] = (kept[0], 0)
                for length in range(1, min(self.longest, end, count) + 1):
                    cost = table[end - length][count - length][0][0] + self._gap(end - length, length)
                    if cost < table[end][count][1][0]:
                        table[end][count][1] = (cost, length)
        return table

    def _read(self, table: list[list[list[tuple[float, int]]]], count: int) -> tuple[int, ...] | None:
        at = self.n_layers
        drop: list[int] = []
        if not np.isfinite(min(each[0] for each in table[at][count])):
            return None
        in_gap: int | None = None  # what the step behind asks for: 0 where a gap was just read
        while at:
            pair = table[at][count]
            gap = in_gap is None and pair[1][0] < pair[0][0]
            if gap:
                length = pair[1][1]
                drop += range(at - length, at)
                at, count, in_gap = at - length, count - length, 0
            else:
                at, in_gap = at - 1, None
        return tuple(sorted(drop))


def _with_swaps(
    drop: tuple[int, ...], costs: _Costs, evidence: Evidence, max_parameters: int | None, options: AutoOptions
) -> tuple[int, ...]:
    """The best of a plan and its neighbours once they are repaired; goes on from a better one."""
    most = options.judged
    if not drop or most < 2 or evidence.groups:
        return drop
    found: dict[tuple[int, ...], float] = {}
    best = drop
    while len(found) < most:
        near = [each for each in (best, *_neighbours(best, costs, max_parameters)) if each not in found]
        # Half of what is left, so that a better plan's own neighbours are seen too.
        turn = near[: math.ceil((most - len(found)) / 2)]
        found |= dict(zip(turn, evidence.damage_repaired(turn, precision=options.precision), strict=True))
        better = min(found, key=lambda each: found[each])
        if better == best or not turn:
            break
        best = better
    return best


def _neighbours(drop: tuple[int, ...], costs: _Costs, max_parameters: int | None) -> Iterator[tuple[int, ...]]:
    """Plans with one layer exchanged, cheapest sum first."""
    gone = set(drop)
    found = []
    for out in drop:
        for new in range(costs.n_layers):
            if new not in gone:
                near = tuple(sorted((gone - {out}) | {new}))
                if costs.fits(near, max_parameters):
                    found.append((costs.of(near), near))
    return (near for _, near in sorted(found))
