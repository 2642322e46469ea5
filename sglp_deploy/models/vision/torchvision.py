"""The adapter for torchvision: ResNet, MobileNet-v2 and EfficientNet, read off the module itself.

torchvision has no checkpoint folder and remembers no arguments.  But everything its constructors decide shows in the
modules they make.  The folder written here says which constructor to call, and with what::

    {"library": "torchvision", "builder": "torchvision.models.resnet.ResNet",
     "arguments": {"block": "Bottleneck", "layers": [3, 4, 5, 3], "num_classes": 1000, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.models.base import ConfigChange, LayerStack
from sglp_deploy.models.vision.rebuild import (
    CONFIG_FILE,
    NO_EMPTY_STAGE,
    NO_SKIP,
    WEIGHTS_FILE,
    all_alike,
    check_weights,
    comes_from,
    fill,
    keeps_shape,
    kept_by_container,
    library,
    qualified_name,
    read_config,
    rebuilt,
    staged_stack,
)

_RESNET = "torchvision.models.resnet.ResNet"
_MOBILENET = "torchvision.models.mobilenetv2.MobileNetV2"
_EFFICIENTNET = "torchvision.models.efficientnet.EfficientNet"
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
_RESNET_BLOCKS = ("BasicBlock", "Bottleneck")
_STAGE_CONFIGS = {"MBConv": "MBConvConfig", "FusedMBConv": "FusedMBConvConfig"}
_DEFAULT_LAST_CHANNEL = 1280  # of MobileNet-v2; grows with a width above 1, never shrinks

Arguments = dict[str, Any]


class TorchvisionAdapter:
    """See :class:`sglp_deploy.models.base.Adapter`."""

    name = "torchvision"

    def matches(self, module: nn.Module) -> bool:
        """Whether its class is defined in torchvision."""
        return comes_from(module, "torchvision")

    def stacks(self, module: nn.Module) -> tuple[LayerStack, ...]:
        """One stack, over all stages."""
        kind = _kind(module)
        if kind == _RESNET:
            first = [next(iter(module.get_submodule(stage).children())) for stage in _RESNET_STAGES]

            def why_not(layer: Any) -> str | None:
                if layer.downsample is not None or not keeps_shape(layer):
                    return NO_SKIP
                return NO_EMPTY_STAGE if any(layer is one for one in first) else None

            return (staged_stack(module, "layer1..layer4", _RESNET_STAGES, why_not),)
        stack = staged_stack(module, "features", _containers(module), _has_no_skip)
        if kind == _EFFICIENTNET:
            return (stack,)
        # Stem and last convolution lie in the same container; they are no layers.
        inner = slice(1, stack.n_layers - 1)
        pinned = {index - 1: why for index, why in stack.pinned.items() if 0 < index < stack.n_layers - 1}
        return (LayerStack(stack.path, stack.names[inner], stack.layers[inner], stack.prunable[inner], pinned),)

    def changes(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> tuple[ConfigChange, ...]:
        """The constructor argument that lists the layers."""
        before = _arguments(module, stack, range(stack.n_layers))
        after = _arguments(module, stack, keep)
        return tuple(
            ConfigChange(f"arguments.{name}", before[name], after[name], "layers of each stage")
            for name in ("layers", "inverted_residual_setting")
            if name in before
        )

    def kinds(self, _module: nn.Module, stack: LayerStack) -> tuple[tuple[Hashable, ...], ...]:
        """All alike: nothing in these families depends on a layer's place."""
        return all_alike(stack)

    def select(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> nn.Module:
        """Built by the constructor with fewer layers; it has the tensors of ``module``."""
        arguments = _arguments(module, stack, keep)
        return rebuilt(module, stack, keep, lambda: _build(_kind(module), arguments))

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """Constructor and arguments, as config.json has them."""
        stack = self.stacks(module)[0]
        return {
            "library": "torchvision",
            "builder": _kind(module),
            "arguments": _arguments(module, stack, range(stack.n_layers)),
        }

    def owns(self, folder: Path) -> bool:
        """Whether config.json says so."""
        return read_config(folder).get("library") == "torchvision"

    def save(self, module: nn.Module, folder: Path) -> None:
        """Constructor, arguments and weights."""
        from safetensors.torch import save_file

        config = {**self.facts(module), "version": library("torchvision").__version__}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in module.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)

    def load(self, folder: Path) -> nn.Module:
        """One constructor call; only the three constructors known here are ever called.

        Raises:
            ArtifactError: If the file asks for another one, or weights and arguments do not belong together.
        """
        from safetensors.torch import load_file

        config = read_config(folder)
        builder, arguments = config.get("builder"), config.get("arguments")
        if not isinstance(builder, str) or builder not in _READERS or not isinstance(arguments, dict):
            raise ArtifactError(
                f"{folder / CONFIG_FILE} asks for the constructor {builder!r}; only {', '.join(_READERS)} are called; "
                "get the checkpoint again"
            )
        if not (folder / WEIGHTS_FILE).is_file():
            raise ArtifactError(f"{folder} has no {WEIGHTS_FILE}; the weights are missing; get the checkpoint again")
        try:
            with torch.device("meta"):
                module = _build(builder, arguments)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"torchvision cannot build {folder}; {type(error).__name__}: {error}; the arguments in {CONFIG_FILE} "
                "are damaged; get the checkpoint again"
            ) from error
        fill(module, load_file(folder / WEIGHTS_FILE), str(folder))
        check_weights(module, folder)
        return module.eval()


def _kind(module: nn.Module) -> str:
    kind = qualified_name(module)
    if kind not in _READERS:
        raise UnsupportedModelError(
            f"{kind} is not among the torchvision models that can be pruned; known: {', '.join(_READERS)}; write an "
            "adapter for it"
        )
    return kind


def _containers(module: nn.Module) -> list[str]:
    """Where the layers lie; an EfficientNet has one container for each stage, between stem and last convolution."""
    kind = _kind(module)
    if kind == _RESNET:
        return list(_RESNET_STAGES)
    if kind == _MOBILENET:
        return ["features"]
    names = [name for name, _ in module.get_submodule("features").named_children()]
    return [f"features.{name}" for name in names[1:-1]]


def _has_no_skip(layer: Any) -> str | None:
    return None if getattr(layer, "use_res_connect", False) and keeps_shape(layer) else NO_SKIP


def _arguments(module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> Arguments:
    """What the constructor takes for a model with the layers ``keep`` of ``module``.

    Raises:
        UnsupportedModelError: If the module holds something no argument stands for, or ``keep`` is refused.
    """
    containers = list(stack.containers) if _kind(module) == _MOBILENET else _containers(module)
    kept = kept_by_container(stack, keep, containers)
    by_container: dict[str, list[Any]] = {container: [] for container in containers}
    for name, layer in zip(stack.names, stack.layers, strict=True):
        by_container[name.rpartition(".")[0]].append(layer)
    left = [
        [by_container[container][place] for place in places] for container, places in zip(containers, kept, strict=True)
    ]
    return _READERS[_kind(module)](module, left)


def _resnet_arguments(module: Any, stages: Sequence[Sequence[Any]]) -> Arguments:
    block = type(stages[0][0]).__name__
    if block not in _RESNET_BLOCKS:
        raise UnsupportedModelError(
            f"the layers of this ResNet are of class {block}; known: {', '.join(_RESNET_BLOCKS)}; write an adapter for "
            "it"
        )
    return {
        "block": block,
        "layers": [len(stage) for stage in stages],
        "num_classes": module.fc.out_features,
        "groups": module.groups,
        "width_per_group": module.base_width,
        # The first layer of a later stage strides, or it is dilated in place of that.
        "replace_stride_with_dilation": [stage[0].stride == 1 for stage in stages[1:]],
        "norm_layer": _norm(module),
    }


def _mobilenet_arguments(module: Any, stages: Sequence[Sequence[Any]]) -> Arguments:
    stem, last = module.features[0][0].out_channels, module.features[-1][0].out_channels
    width, rounding = _width(stem, last)
    rows, channels = [], stem
    for layer in stages[0]:
        convolutions = [part for part in layer.conv.modules() if isinstance(part, nn.Conv2d)]
        hidden, out = convolutions[0].out_channels, convolutions[-1].out_channels
        expansion = hidden / channels if len(convolutions) == 3 else 1
        rows.append([_whole(expansion), _whole(out / width), 1, layer.stride])
        channels = out
    return {
        "num_classes": module.classifier[-1].out_features,
        "width_mult": _whole(width),
        "inverted_residual_setting": rows,
        "round_nearest": rounding,
        "dropout": module.classifier[0].p,
        "norm_layer": _norm(module),
    }


def _width(stem: int, last: int) -> tuple[float, int]:
    """A width multiplier and a rounding that give these two channel counts, as the constructor computes them."""
    divisible: Callable[..., int] = library("torchvision.models._utils")._make_divisible
    for width in (last / _DEFAULT_LAST_CHANNEL, stem / 32):
        for rounding in (8, 1):
            made = divisible(32 * width, rounding), divisible(_DEFAULT_LAST_CHANNEL * max(1.0, width), rounding)
            if made == (stem, last):
                return width, rounding
    raise UnsupportedModelError(
        f"no width makes a MobileNetV2 with {stem} channels after its stem and {last} before its classifier; it was "
        "changed after it was built; build it with arguments alone"
    )


def _efficientnet_arguments(module: Any, stages: Sequence[Sequence[Any]]) -> Arguments:
    channels = module.features[0][0].out_channels
    rows: list[Arguments] = []
    for stage in stages:
        rows.append(_stage(stage, channels))
        channels = rows[-1]["out_channels"]
    return {
        "inverted_residual_setting": rows,
        "dropout": module.classifier[0].p,
        "stochastic_depth_prob": _stochastic_depth([layer for stage in module.features[1:-1] for layer in stage]),
        "num_classes": module.classifier[-1].out_features,
        "norm_layer": _norm(module),
        "last_channel": module.features[-1][0].out_channels,
    }


def _stage(layers: Sequence[Any], channels: int) -> Arguments:
    """One stage as its configuration class takes it; ``channels`` go in."""
    if not layers:  # all its layers kept the shape, and all are gone
        return {
            "class": "MBConvConfig",
            "expand_ratio": 1,
            "kernel": 3,
            "stride": 1,
            "input_channels": channels,
            "out_channels": channels,
            "num_layers": 0,
        }
    first = layers[0]
    kind = type(first).__name__
    if kind not in _STAGE_CONFIGS:
        raise UnsupportedModelError(
            f"the layers of this EfficientNet are of class {kind}; known: {', '.join(_STAGE_CONFIGS)}; write an "
            "adapter for it"
        )
    parts = list(first.block)
    fused = kind == "FusedMBConv"
    expands = len(parts) == (2 if fused else 4)
    spatial = parts[0] if fused or not expands else parts[1]
    return {
        "class": _STAGE_CONFIGS[kind],
        "expand_ratio": _whole(parts[0][0].out_channels / channels) if expands else 1,
        "kernel": spatial[0].kernel_size[0],
        "stride": spatial[0].stride[0],
        "input_channels": channels,
        "out_channels": first.out_channels,
        "num_layers": len(layers),
    }


def _stochastic_depth(layers: Sequence[Any]) -> float:
    """The rate that grows linearly from 0 at the first layer; of no effect in evaluation mode."""
    last = len(layers) - 1
    return round(layers[last].stochastic_depth.p * len(layers) / last, 6) if last > 0 else 0.0


def _norm(module: nn.Module) -> Arguments:
    """What all normalisations of ``module`` have in common; epsilon is in no weight."""
    norms = {
        (qualified_name(part), getattr(part, "eps", None), getattr(part, "momentum", None))
        for part in module.modules()
        if "Norm" in type(part).__name__ and not list(part.children())
    }
    kind, eps, momentum = next(iter(norms), ("", None, None))
    if len(norms) != 1 or kind != "torch.nn.modules.batchnorm.BatchNorm2d":
        raise UnsupportedModelError(
            f"this {type(module).__name__} has {len(norms)} kinds of normalisation "
            f"({', '.join(sorted(map(str, norms)))}); one kind of BatchNorm2d throughout can be rebuilt; write an "
            "adapter for it"
        )
    return {"eps": eps, "momentum": momentum}


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


_READERS: Mapping[str, Callable[[Any, Sequence[Sequence[Any]]], Arguments]] = {
    _RESNET: _resnet_arguments,
    _MOBILENET: _mobilenet_arguments,
    _EFFICIENTNET: _efficientnet_arguments,
}


def _build(builder: str, arguments: Arguments) -> nn.Module:
    """Call one of the known constructors with ``arguments``, names turned into the classes they stand for."""
    file, _, name = builder.rpartition(".")
    source = library(file)
    given = dict(arguments)
    given["norm_layer"] = partial(nn.BatchNorm2d, **given["norm_layer"])
    if builder == _RESNET:
        if given["block"] not in _RESNET_BLOCKS:
            raise ValueError(f"unknown block {given['block']!r}")
        given["block"] = getattr(source, given["block"])
    elif builder == _EFFICIENTNET:
        given["inverted_residual_setting"] = [_stage_config(source, row) for row in given["inverted_residual_setting"]]
    made: nn.Module = getattr(source, name)(**given)
    return made


def _stage_config(source: Any, row: Arguments) -> Any:
    facts = dict(row)
    kind = facts.pop("class")
    if kind not in _STAGE_CONFIGS.values():
        raise ValueError(f"unknown stage {kind!r}")
    return getattr(source, kind)(**facts)
