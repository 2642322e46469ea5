"""What must hold of a decision and of a plan, whoever made it: neither is believed because it can be read."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sglp_deploy.errors import PlanError
from sglp_deploy.planners.budget import Budget, LayerFacts, check_segments
from sglp_deploy.planners.seam import LayerDecision


def plan_fault(plan: Any) -> str | None:
    """The first invariant a :class:`sglp_deploy.plan.PruningPlan` breaks, in words, or None.

    Any: the class lies above this module.
    """
    layers = set(range(plan.n_layers))
    for name, chosen in (("keep", plan.keep), ("drop", plan.drop)):
        if list(chosen) != sorted(set(chosen)):
            return f"{name} {list(chosen)} is not in rising order without repeats"
        if not layers.issuperset(chosen):
            return f"{name} {list(chosen)} names a layer outside 0..{plan.n_layers - 1}"
    if not plan.keep:
        return "no layer is kept"
    if layers.difference(plan.drop) != set(plan.keep):
        return f"keep {list(plan.keep)} and drop {list(plan.drop)} do not complete each other"
    if wrong := check_segments(plan.segments, plan.n_layers):
        return wrong
    for start, end in plan.segments:
        if not any(start <= layer < end for layer in plan.keep):
            return f"segment [{start}, {end}) has no survivor"
    if len(plan.segment_losses) not in (0, plan.n_layers) or not np.isfinite(plan.segment_losses).all():
        return f"segment_losses is not one finite number for each of 1..{plan.n_layers} segments"
    for name, row in plan.scores.items():
        if len(row) != plan.n_layers or not np.isfinite(row).all():
            return f"the {name} scores are not one finite number for each of {plan.n_layers} layers"
    if plan.criterion is not None and plan.criterion not in plan.scores:
        return f"criterion {plan.criterion!r} has no scores"
    if plan.similarity is not None:
        if {len(plan.similarity), *map(len, plan.similarity)} != {plan.n_layers}:
            return f"similarity is not {plan.n_layers} by {plan.n_layers}"
        if not np.isfinite(plan.similarity).all():
            return "similarity holds NaN or infinity"
    if plan.width is not None:
        return "it lists kept channels, and this version prunes no width"
    if plan.overlay is not None and (wrong := _overlay_fault(plan.overlay)):
        return wrong
    missing = [name for name in ("id", "fingerprint") if not isinstance(plan.model.get(name), str)]
    return f"model lacks {' and '.join(missing)}" if missing else None


def _overlay_fault(overlay: Mapping[str, Any]) -> str | None:
    if not re.fullmatch(r"[0-9a-f]{64}", str(overlay.get("digest"))):
        return "its overlay has no digest"
    steps = overlay.get("made_by")
    if not isinstance(steps, Sequence) or not all(isinstance(step, Mapping) for step in steps):
        return "its overlay does not say who made it"
    if not all(isinstance(overlay.get(name), int) for name in ("n_tensors", "bytes")):
        return "its overlay does not say how large it is"
    return None


def checked(decision: Any, layers: LayerFacts, budget: Budget, method: str) -> LayerDecision:
    """A planner's decision in plain numbers, refused where it is not what was asked for.

    Args:
        decision: What ``decide`` returned.
        layers: The evidence.
        budget: What was asked for.
        method: The planner, for messages.

    Raises:
        PlanError: Naming the planner and what is wrong.
    """
    blame = f"; the planner {method!r} is at fault, report it to its author"
    if not isinstance(decision, LayerDecision):
        raise PlanError(f"the planner returned {type(decision).__name__} and no LayerDecision{blame}")
    try:
        drop = tuple(operator.index(layer) for layer in decision.drop)
        segments = tuple((operator.index(start), operator.index(end)) for start, end in decision.segments)
        scores = {str(name): tuple(map(float, row)) for name, row in decision.scores.items()}
        losses = tuple(map(float, decision.segment_losses))
    except (TypeError, ValueError) as error:
        raise PlanError(f"the decision holds something that is no number; {error}{blame}") from error
    n_drop = budget.n_drop(layers.n_layers)
    fault = None
    if len(set(drop)) != len(drop) or not set(drop) <= set(range(layers.n_layers)):
        fault = f"it removes layers {list(drop)} of 0..{layers.n_layers - 1}"
    elif n_drop is not None and len(drop) != n_drop:
        fault = f"it removes {len(drop)} layers, and {n_drop} were to go"
    elif fixed := [layer for layer in drop if not layers.prunable[layer]]:
        fault = f"it removes layer {fixed[0]}, which must stay"
    elif n_drop is None and budget.max_parameters is not None:
        left = int(layers.parameters.sum()) + layers.other_parameters - int(layers.parameters[list(drop)].sum())
        if left > budget.max_parameters:
            fault = f"it leaves {left} parameters, and max_parameters={budget.max_parameters}"
    if fault:
        raise PlanError(f"the decision is not what was asked for; {fault}{blame}")
    return replace(decision, drop=drop, segments=segments, scores=scores, segment_losses=losses)
