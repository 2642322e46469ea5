"""A configuration in which every per-layer entry matches the layers that are kept.

Here is which part of a configuration describes the layers, in what order it is changed, and what a family refuses.
What one entry becomes is said by :mod:`sglp_deploy.models.transformers.rules`.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, cast

from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models.base import ConfigChange
from sglp_deploy.models.transformers.families import FAMILIES, Family
from sglp_deploy.models.transformers.rules import BACKBONE_STAGES, entry_change, layer_facts, own_entries

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Types of layers that keep no keys and values; a cache of nothing else has no length, and its first use fails.
_WITHOUT_LENGTH = frozenset({"conv", "linear_attention", "mamba", "mlp", "moe"})

_OVERRIDES = "per_layer_config"  # settings of single layers, filed under their numbers


def pruned_config(config: PretrainedConfig, keep: Sequence[int], *, side: str = "layers") -> PretrainedConfig:
    """A copy of ``config`` for the layers ``keep``.

    Args:
        config: Configuration of the unpruned model.
        keep: Old indices of the layers to keep; rising, except when an exporter repeats a layer to trace it.
        side: "encoder" or "decoder" for a model that has both.

    Returns:
        A new configuration; ``config`` is left as it is.

    Raises:
        UnsupportedModelError: If an entry's meaning depends on layer numbers and no other value of it fits ``keep``.
    """
    new = copy.deepcopy(config)
    apply_changes(new, config_changes(config, keep, side=side))
    return new


def apply_changes(config: PretrainedConfig, changes: Sequence[ConfigChange]) -> None:
    """Write ``changes`` into ``config`` in place."""
    values = {change.entry: change.after for change in changes if change.after != change.before}
    for entry, value in sorted(values.items(), key=lambda item: item[0].endswith(_OVERRIDES)):
        part, _, name = entry.rpartition(".")
        owner = _part(config, part)
        if f"_{name}" in BACKBONE_STAGES:
            name = f"_{name}"  # the public name is a property that checks, see below
        before = vars(owner).get(name)
        # Length and lists are set together behind the validator's back: it would refuse every intermediate state.
        if name == _OVERRIDES:
            owner.per_layer_config = {int(layer): facts for layer, facts in value.items()}
        elif value is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = tuple(value) if isinstance(before, tuple) else value
    config.validate()


def config_changes(config: PretrainedConfig, keep: Sequence[int], *, side: str = "layers") -> tuple[ConfigChange, ...]:
    """What keeping the layers ``keep`` changes in ``config``, and which entries were looked at and left.

    Raises:
        UnsupportedModelError: See :func:`pruned_config`.
    """
    family = FAMILIES.get(config.model_type, Family())
    if family.stages is not None:
        return _stage_changes(config, keep, family)
    name = depth_entry(config, side)
    part, owner = depth_owner(config, side)
    depth = getattr(owner, name)
    check_derived(config, family, side, keep)
    _check_cache_has_a_length(owner, depth, keep)
    changes = [ConfigChange(name, depth, len(keep), "number of layers")]
    for entry, value in own_entries(owner):
        if entry == name:
            continue
        found = entry_change(owner, entry, value, depth, keep, family, side)
        if found is not None:
            changes.append(found)
    if getattr(owner, "is_heterogeneous", False):
        overrides = owner._heterogeneity_spec.per_layer_overrides
        after = {new: overrides[old] for new, old in enumerate(keep) if old in overrides}
        changes.append(ConfigChange(_OVERRIDES, overrides, after, "overrides of kept layers, renumbered"))
    prefix = f"{part}." if part else ""
    return tuple(ConfigChange(prefix + c.entry, _json(c.before), _json(c.after), c.rule) for c in changes)


def depth_entry(config: PretrainedConfig, side: str) -> str:
    """Name of the entry that counts the layers of ``side``, as the configuration stores it."""
    wanted = {
        "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
        # T5 may carry both; only the longer name decides what is built.
        "decoder": ("num_decoder_layers", "decoder_layers"),
    }.get(side, ("num_hidden_layers",))
    _, owner = depth_owner(config, side)
    for name in wanted:
        stored = owner.attribute_map.get(name, name)
        if isinstance(vars(owner).get(stored), int):
            return str(stored)
    raise UnsupportedModelError(
        f"the configuration of {config.model_type!r} counts its layers under none of {', '.join(wanted)}; without a "
        "count nothing can be removed; write an adapter for this family"
    )


def depth_owner(config: PretrainedConfig, side: str) -> tuple[str, PretrainedConfig]:
    """The part of ``config`` that describes the stack, and its dotted name: a composite model counts layers inside."""
    if side != "layers" or isinstance(getattr(config, "num_hidden_layers", None), int):
        return "", config
    text: PretrainedConfig = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            return name, text
    return "", config


def layer_kinds(config: PretrainedConfig, side: str = "layers") -> tuple[tuple[Hashable, ...], ...]:
    """What the configuration and the family's code say about each layer by its place, by stage.

    Layers of equal kind may take each other's place.
    """
    family = FAMILIES.get(config.model_type, Family())
    if family.stages is not None:
        return tuple(
            tuple(family.derived(config, side, index) if family.derived else None for index in range(depth))
            for depth in family.lengths(config)
        )
    _, owner = depth_owner(config, side)
    depth = getattr(owner, depth_entry(config, side))
    return (
        tuple(
            (
                family.derived(config, side, index) if family.derived else None,
                *layer_facts(owner, depth, index, family, side),
            )
            for index in range(depth)
        ),
    )


def check_derived(config: PretrainedConfig, family: Family, side: str, keep: Sequence[int], *, start: int = 0) -> None:
    """Refuse kept layers whose behaviour the family's code derives from their position, when it would change.

    Args:
        config: Configuration of the unpruned model.
        family: Its declared facts.
        side: See :func:`pruned_config`.
        keep: Kept layers of the stack, or of one stage, counted within it.
        start: Layers in earlier stages.

    Raises:
        UnsupportedModelError: Naming the first such layer and the family's rule.
    """
    if family.derived is None:
        return
    for new, old in enumerate(keep):
        if family.derived(config, side, old) != family.derived(config, side, new):
            place = f"number {new} of its stage" if family.stages is not None else f"layer {new}"
            raise UnsupportedModelError(
                f"layer {start + old} would become {place} and behave differently there; the code of "
                f"{config.model_type!r} derives it from the layer's number and no configuration entry can say "
                f"otherwise; {family.derived_rule}; plan with --preserve-pattern"
            )


def _check_cache_has_a_length(config: PretrainedConfig, depth: int, keep: Sequence[int]) -> None:
    """Refuse to leave a hybrid without attention: its cache could not tell how many tokens it holds.

    transformers asks at every call; the model would load and fail at its first token.
    """
    types = getattr(config, "layer_types", None)  # a property, where it is derived
    if not isinstance(types, (list, tuple)) or len(types) != depth:
        return
    attend = [index for index, kind in enumerate(types) if kind not in _WITHOUT_LENGTH]
    if attend and not set(attend) & set(keep):
        raise UnsupportedModelError(
            f"none of the layers with attention ({', '.join(map(str, attend))}) is kept, and the cache of a model "
            "without attention has no length, so its first call fails; keep one of them"
        )


def _stage_changes(config: PretrainedConfig, keep: Sequence[int], family: Family) -> tuple[ConfigChange, ...]:
    depths = family.lengths(config)
    after, start = [], 0
    for depth in depths:
        kept = [index - start for index in keep if start <= index < start + depth]
        check_derived(config, family, "layers", kept, start=start)
        after.append(len(kept))
        start += depth
    if family.stage_lengths is not None:
        return ()
    return (ConfigChange(family.stage_depths, _json(depths), after, "layers of each stage"),)


def _part(config: PretrainedConfig, dotted: str) -> PretrainedConfig:
    owner: Any = config
    for name in dotted.split(".") if dotted else ():
        owner = getattr(owner, name)
    return cast("PretrainedConfig", owner)


def _json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
