"""Repeating kinds of layers (local, local, global, ...), and what to do where a runtime knows only the repetition.

Some runtimes read each layer's type from ``layer_types``.  Others work it out from the layer's number.  For the second
kind a pruned model is right only while its kinds still follow the formula.  So whole periods must go.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from sglp_deploy.errors import ExportError, PlanError

Groups = tuple[tuple[int, ...], ...]

_LAYER_TYPES = "layer_types"


def pattern_period(kinds: Sequence[Hashable]) -> int | None:
    """The smallest period of ``kinds`` that occurs at least twice, or None; 1 when all layers are of one kind."""
    for period in range(1, len(kinds) // 2 + 1):
        if all(kinds[index] == kinds[index + period] for index in range(len(kinds) - period)):
            return period
    return None


def pattern_groups(stages: Sequence[Sequence[Hashable]], prunable: Sequence[bool]) -> Groups:
    """Runs of layers that can only go together if the pattern is to stay: one whole period each.

    Args:
        stages: Kinds of the layers, by stage; one stage for a plain stack.
        prunable: Whether each layer may be removed (L).

    Returns:
        Aligned whole periods of removable layers; an incomplete period at the end stays in the model.

    Raises:
        PlanError: If no stage repeats, or no whole period may go.
    """
    groups: list[tuple[int, ...]] = []
    start = 0
    for kinds in stages:
        period = pattern_period(kinds)
        if period is not None:
            whole = range(0, len(kinds) - period + 1, period)
            groups += [tuple(range(start + first, start + first + period)) for first in whole]
        start += len(kinds)
    removable = tuple(group for group in groups if all(prunable[layer] for layer in group))
    if not removable:
        raise PlanError(
            "no whole period of the layer pattern can be removed; the kinds of the layers do not repeat, or every "
            "period holds a layer that must stay; plan without preserve_pattern"
        )
    return removable


def keeps_pattern(kinds: Sequence[Hashable], keep: Sequence[int]) -> bool:
    """Whether every kept layer has, at its new place, the kind that place had before."""
    return all(kinds[old] == kinds[new] for new, old in enumerate(keep))


def check_layer_types(exporter: Any, config: Any, changes: Sequence[Mapping[str, Any]], keep: Sequence[int]) -> None:
    """Refuse an exporter that would give layers other types than the configuration says.

    An exporter declares what it does by ``layer_type_formula(model_type)``: None when it reads ``layer_types``, else a
    function from a layer's number to its type.  One that declares nothing is trusted only with an unbroken pattern.

    Args:
        exporter: Any object of the exporter protocol.
        config: Configuration of the pruned model, or None.
        changes: The plan's ``config_changes``.
        keep: Layers the plan keeps.

    Raises:
        ExportError: Naming the first layer it would get wrong and what to do.
    """
    types: Sequence[str] = getattr(config, _LAYER_TYPES, None) or ()
    declare: Callable[[str], Callable[[int], str] | None] | None = getattr(exporter, "layer_type_formula", None)
    advice = "plan with --preserve-pattern, which removes whole periods, or export to a format that reads layer_types"
    if not types:
        return
    if declare is None:
        before = next((c["before"] for c in changes if c["entry"].endswith(_LAYER_TYPES)), None)
        if before is not None and not keeps_pattern(before, keep):
            raise ExportError(
                f"exporter {exporter.name!r} does not declare whether it reads layer_types or derives them from a "
                f"layer's number, and this plan breaks the pattern; {advice}"
            )
        return
    formula = declare(config.model_type)
    if formula is None:
        return
    for index, kind in enumerate(types):
        if formula(index) != kind:
            raise ExportError(
                f"{exporter.name!r} derives the type of a {config.model_type} layer from its number and would take "
                f"layer {index} for {formula(index)!r}, where it is {kind!r}; prompts longer than the window would be "
                f"wrong without an error; {advice}"
            )
