"""What must hold between the fields of a plan, whoever wrote it: a file is not believed because it can be read."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglp_deploy.planners.budget import check_segments


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
    if plan.overlay is not None and not isinstance(plan.overlay.get("digest"), str):
        return "its overlay has no digest"
    missing = [name for name in ("id", "fingerprint") if not isinstance(plan.model.get(name), str)]
    return f"model lacks {' and '.join(missing)}" if missing else None
