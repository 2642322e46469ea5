"""Find the layers of a transformers model: one rule for every family, and the family's declared facts on top.

A stack is the module list that is as long as the configuration says the model is deep and holds the most parameters.
Anything that makes this ambiguous is refused, never guessed.  A wrong stack would make a model that loads and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models.base import LayerStack
from sglp_deploy.models.transformers.config import depth_entry, depth_owner
from sglp_deploy.models.transformers.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTAINERS = (nn.ModuleList, nn.Sequential)


def find_stacks(model: PreTrainedModel) -> tuple[LayerStack, ...]:
    """The stacks of ``model``: one, or decoder and encoder; the decoder first, because generation takes its time there.

    Raises:
        UnsupportedModelError: If no module list fits what the configuration says, or several do.
    """
    config = model.config
    family = FAMILIES.get(config.model_type, Family())
    reason = family.refuse(config)
    if reason:
        raise UnsupportedModelError(f"model type {config.model_type!r} cannot be pruned in depth; {reason}")
    if family.stages is not None:
        return (_staged_stack(model, family),)
    if family.loop is not None:
        return (_looped_stack(model, family, family.loop),)
    return tuple(_plain_stack(model, family, side) for side in _sides(model))


def _plain_stack(model: PreTrainedModel, family: Family, side: str) -> LayerStack:
    config = model.config
    entry = depth_entry(config, side)
    part, owner = depth_owner(config, side)
    depth = getattr(owner, entry)
    said = f"{part}.{entry}" if part else entry
    within = "" if side == "layers" else _side_path(model, side)
    lists = {
        path: modules
        for path, modules in _outermost_lists(model, depth)
        if _inside(path, within) and not path.endswith(family.not_layers or ("\0",))
    }
    if not lists:
        lengths = (
            ", ".join(f"{path} ({len(list(modules.children()))})" for path, modules in _all_lists(model)) or "none"
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module list of {depth} layers, as {said}={depth} says; module lists found: "
            f"{lengths}; repair the checkpoint's config.json, or write an adapter for this family"
        )
    # Lists within another candidate's layers are out already; of what is left, a second one of weight is a second
    # thing that exists once per layer, and nobody said what removing a layer means for it.
    sizes = {path: sum(p.numel() for p in modules.parameters()) for path, modules in lists.items()}
    path = max(sizes, key=lambda name: sizes[name])
    others = [name for name in lists if name != path and sizes[name]]
    if others:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {len(lists)} module lists of {depth} entries ({path}, {', '.join(others)}); "
            "which of them are layers is not declared for this family; write an adapter for it"
        )
    pinned = {index: why for index, why in family.pinned(config, side).items() if index < depth}
    return LayerStack(
        path,
        tuple(f"{path}.{index}" for index in range(depth)),
        tuple(lists[path].children()),
        tuple(index not in pinned for index in range(depth)),
        pinned,
        side,
    )


def _staged_stack(model: PreTrainedModel, family: Family) -> LayerStack:
    assert family.stages is not None
    config, pattern = model.config, re.compile(family.stages)
    containers = [(path, module) for path, module in model.named_modules() if pattern.fullmatch(path)]
    depths = family.lengths(config)
    lengths = [len(list(module.children())) for _, module in containers]
    one_container = family.stage_lengths is not None and len(lengths) == 1
    if lengths != ([sum(depths)] if one_container else depths):
        raise UnsupportedModelError(
            f"{type(model).__name__} has stages of {lengths} layers where its configuration says {depths}; the "
            "checkpoint is inconsistent; repair its config.json"
        )
    names = tuple(f"{path}.{name}" for path, module in containers for name, _ in module.named_children())
    layers = tuple(layer for _, module in containers for layer in module.children())
    pinned = family.pinned(config, "layers")
    prunable = tuple(index not in pinned for index in range(len(layers)))
    return LayerStack(_common_prefix(path for path, _ in containers), names, layers, prunable, pinned)


def _looped_stack(model: PreTrainedModel, family: Family, loop: str) -> LayerStack:
    path = next((name for name, _ in model.named_modules() if name == loop or name.endswith(f".{loop}")), None)
    if path is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no {loop}, the layer its family repeats")
    depth = model.config.num_hidden_layers
    layer = model.get_submodule(path)
    pinned = family.pinned(model.config, "layers")
    prunable = tuple(index not in pinned for index in range(depth))
    return LayerStack(path, (path,) * depth, (layer,) * depth, prunable, pinned)


def _sides(model: PreTrainedModel) -> tuple[str, ...]:
    """The sides ``model`` has, by its modules: a class may be one half of a family whose configuration counts both."""
    config = model.config
    counted = any(isinstance(vars(config).get(name), int) for name in ("decoder_layers", "num_decoder_layers"))
    if not (config.is_encoder_decoder or counted):
        return ("layers",)
    present = tuple(side for side in ("decoder", "encoder") if _side_path(model, side))
    if config.is_encoder_decoder:  # WhisperForAudioClassification says so too, and has no decoder
        return present or ("decoder", "encoder")
    # BartForCausalLM: its num_hidden_layers is another name for the depth of the encoder it does not have.
    return ("decoder",) if present == ("decoder",) else ("layers",)


def _side_path(model: PreTrainedModel, side: str) -> str:
    module = model.get_encoder() if side == "encoder" else model.get_decoder()
    return next((name for name, found in model.named_modules() if found is module), "")


def _inside(path: str, within: str) -> bool:
    return not within or path.startswith(f"{within}.")


def _all_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS) and len(module):
            yield path, module


def _outermost_lists(model: nn.Module, depth: int) -> list[tuple[str, nn.Module]]:
    """Module lists of ``depth`` entries that do not lie within an entry of another one."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in _all_lists(model):
        if len(list(module.children())) == depth and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, module))
    return found


def _common_prefix(paths: Iterator[str]) -> str:
    split = [path.split(".") for path in paths]
    parts = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        parts.append(column[0])
    return ".".join(parts)
