"""Vision models of transformers; those of timm and torchvision have adapters of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from sglp_deploy.models.base import ConfigChange
from sglp_deploy.models.transformers.families.base import Config, Family

_SWIN_STAGES = r"(?:.*\.)?encoder\.layers\.\d+\.blocks"
_SWIN_RULE = (
    "every second layer of a stage shifts its windows, so layers must go in neighbouring pairs or from a stage's end"
)
_CONV_STAGES = r"(?:.*\.)?encoder\.stages\.\d+\.layers"


def _first_of_each_stage(lengths: Sequence[int], reason: str) -> Mapping[int, str]:
    return dict.fromkeys((0, *accumulate(lengths[:-1])), reason)


def _resnet_pins(config: Config, _side: str) -> Mapping[int, str]:
    # In ResNet-18 and 34 the very first one keeps the shape; even so the code builds one layer for a depth of 0.
    return _first_of_each_stage(
        config.depths, "it is the first layer of its stage: it changes the shape, and no stage is built without one"
    )


def _efficientnet_lengths(config: Config) -> list[int]:
    return [math.ceil(config.depth_coefficient * repeats) for repeats in config.num_block_repeats]


def _efficientnet_pins(config: Config, _side: str) -> Mapping[int, str]:
    return _first_of_each_stage(
        _efficientnet_lengths(config),
        "it is the first layer of its stage, which has no skip connection to hand its input on",
    )


def _efficientnet_changes(module: Any, _side: str, keep: Sequence[int]) -> tuple[ConfigChange, ...]:
    config = module.config
    repeats, start = [], 0
    for length in _efficientnet_lengths(config):
        repeats.append(sum(start <= layer < start + length for layer in keep))
        start += length
    padded = list(config.depthwise_padding)
    return (
        ConfigChange(
            "depth_coefficient", config.depth_coefficient, 1.0, "1, because num_block_repeats says it exactly"
        ),
        ConfigChange("num_block_repeats", list(config.num_block_repeats), repeats, "layers of each stage"),
        ConfigChange(
            "depthwise_padding",
            padded,
            [new for new, old in enumerate(keep) if old in padded],
            "layer numbers, renumbered",
        ),
        # Not a depth: transformers derives it from the repeats on every load.
        ConfigChange("num_hidden_layers", config.num_hidden_layers, 4 * sum(repeats), "four times the repeats"),
    )


def _swin_shift(_config: Config, _side: str, position: int) -> str:
    return "shifted" if position % 2 else "unshifted"


def _swin_as_loaded(model: nn.Module) -> None:
    """An image smaller than the window makes a layer's window small and unshifted, for good."""
    config: Any = model.config
    window: int = config.window_size
    for stage in model.modules():
        for position, layer in enumerate(getattr(stage, "blocks", None) or ()):
            layer.window_size = window
            layer.shift_size = window // 2 if position % 2 else 0


FAMILIES: Mapping[str, Family] = {
    "vit": Family(),
    "deit": Family(),
    "dinov2": Family(note="every layer is a stage: names and numbers of the stages follow"),
    "dinov2_with_registers": Family(note="every layer is a stage: names and numbers of the stages follow"),
    "swin": Family(
        stages=_SWIN_STAGES,
        derived=_swin_shift,
        derived_rule=_SWIN_RULE,
        reset=_swin_as_loaded,
        note="a stage may lose all its layers, its patch merging stays",
    ),
    "swinv2": Family(
        stages=_SWIN_STAGES,
        derived=_swin_shift,
        derived_rule=_SWIN_RULE,
        note="a stage may lose all its layers, its patch merging stays",
    ),
    "convnext": Family(stages=_CONV_STAGES, note="a stage may lose all its layers, its downsampling stays"),
    "convnextv2": Family(stages=_CONV_STAGES, note="a stage may lose all its layers, its downsampling stays"),
    "resnet": Family(stages=_CONV_STAGES, pinned=_resnet_pins, note="the first layer of a stage stays"),
    "efficientnet": Family(
        stages=r"(?:.*\.)?encoder\.blocks",
        stage_lengths=_efficientnet_lengths,
        pinned=_efficientnet_pins,
        more_changes=_efficientnet_changes,
        note="the first layer of a stage stays; depth_coefficient becomes 1",
    ),
    "mobilenet_v2": Family(
        refuse=lambda _config: (
            "its 16 layers are written into the code of transformers, so no folder can hold a model "
            "of fewer; use the model of the same name in timm or torchvision"
        ),
        note="refused",
    ),
}
