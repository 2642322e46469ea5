"""The adapter for timm: residual networks and transformers that ``timm.create_model`` made.

timm remembers the arguments a model was created with.  It reads them back from a folder
(``timm.create_model("local-dir:FOLDER", pretrained=True)``).  The depth of most families is such an argument.  No
builder takes the blocks of an EfficientNet or MobileNet.  There the folder describes the whole model.  It lists the
blocks that were kept, under ``kept_blocks``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.models.base import ConfigChange, LayerStack
from sglp_deploy.models.quiet import quiet_libraries
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
    plain_json,
    qualified_name,
    read_config,
    rebuilt,
    staged_stack,
)

_RESNET = "timm.models.resnet.ResNet"
_TRANSFORMER = "timm.models.vision_transformer.VisionTransformer"
_MOBILE = ("timm.models.efficientnet.EfficientNet", "timm.models.mobilenetv3.MobileNetV3")
_SUPPORTED = (_RESNET, _TRANSFORMER, *_MOBILE)
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
# Blocks of the whole model that are left, by stage; in config.json and on the model itself.
_KEPT = "kept_blocks"


class TimmAdapter:
    """See :class:`sglp_deploy.models.base.Adapter`."""

    name = "timm"

    def matches(self, module: nn.Module) -> bool:
        """Whether its class is defined in timm."""
        return comes_from(module, "timm")

    def stacks(self, module: nn.Module) -> tuple[LayerStack, ...]:
        """One stack; over the stages, where there are stages."""
        _origin(module)
        path, why_not = {
            _RESNET: ("layer1..layer4", _resnet_pin(module)),
            _TRANSFORMER: ("blocks", _transformer_pin),
        }.get(qualified_name(module), ("blocks", _mobile_pin))
        return (staged_stack(module, path, _containers(module), why_not),)

    def changes(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> tuple[ConfigChange, ...]:
        """The argument that holds the depth, or the list of kept blocks."""
        containers = _containers(module)
        kept = kept_by_container(stack, keep, containers)
        before = [len(list(module.get_submodule(container).children())) for container in containers]
        after = [len(stage) for stage in kept]
        kind = qualified_name(module)
        if kind == _RESNET:
            return (ConfigChange("model_args.layers", before, after, "layers of each stage"),)
        if kind == _TRANSFORMER:
            return (ConfigChange("model_args.depth", before[0], after[0], "number of layers"),)
        numbers = _kept_blocks(module)
        left = [[stage[place] for place in places] for stage, places in zip(numbers, kept, strict=True)]
        rule = "blocks kept of each stage: timm's builder takes no such list, so the folder names them"
        return (ConfigChange(_KEPT, numbers, left, rule),)

    def kinds(self, _module: nn.Module, stack: LayerStack) -> tuple[tuple[Hashable, ...], ...]:
        """All alike: nothing in these families depends on a layer's place."""
        return all_alike(stack)

    def select(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> nn.Module:
        """Built by ``timm.create_model`` with fewer layers; it has the tensors of ``module``."""
        architecture, arguments = _origin(module)
        (change,) = self.changes(module, stack, keep)
        timm = library("timm")
        if change.entry == _KEPT:
            new = rebuilt(module, stack, keep, lambda: _cut(timm.create_model(architecture, **arguments), change.after))
        else:
            depth = tuple(change.after) if isinstance(change.after, list) else change.after
            arguments[change.entry.rpartition(".")[2]] = depth
            new = rebuilt(module, stack, keep, lambda: timm.create_model(architecture, **arguments))
        any_new: Any = new
        any_new.pretrained_cfg = any_new.default_cfg = copy.deepcopy(module.pretrained_cfg)
        return new

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """What the model was created with; dropout rates, which timm does not keep, left out."""
        architecture, _ = _origin(module)
        arguments = plain_json(library("timm.models").get_model_args(module))
        facts = {"library": "timm", "architecture": architecture, "model_args": arguments}
        return facts | ({_KEPT: _kept_blocks(module)} if qualified_name(module) in _MOBILE else {})

    def owns(self, folder: Path) -> bool:
        """Whether config.json names a timm architecture; one with a ``model_type`` as well is for transformers."""
        config = read_config(folder)
        return isinstance(config.get("architecture"), str) and "model_type" not in config

    def save(self, module: nn.Module, folder: Path) -> None:
        """With timm's own function.

        Raises:
            UnsupportedModelError: If an argument the model was created with cannot be written as JSON.
        """
        _origin(module)
        try:
            library("timm.models").save_for_hf(module, folder, safe_serialization=True)
        except ValueError as error:
            raise UnsupportedModelError(
                f"timm cannot write what {type(module).__name__} was created with; {error}; create it with names "
                "(strings) in place of classes and functions"
            ) from error
        if hasattr(module, _KEPT):
            file = folder / CONFIG_FILE
            config = _io.parse_json(file.read_text(encoding="utf-8"), ours=False) | {_KEPT: _kept_blocks(module)}
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> nn.Module:
        """With ``timm.create_model`` by the name of a registered architecture, and nothing else from the file.

        Raises:
            ArtifactError: If the architecture is unknown, or a stored tensor was not taken over.
        """
        timm = library("timm")
        config = read_config(folder)
        architecture = config.get("architecture")
        if not isinstance(architecture, str) or not timm.is_model(architecture):
            raise ArtifactError(
                f"{folder / CONFIG_FILE} names the architecture {architecture!r}, which this timm "
                f"({timm.__version__}) does not know; use the timm it was written with"
            )
        if not (folder / WEIGHTS_FILE).is_file():
            raise ArtifactError(f"{folder} has no {WEIGHTS_FILE}; the weights are missing; get the checkpoint again")
        try:
            with quiet_libraries():
                module = _plain(timm, folder) if _KEPT not in config else _with_kept(timm, architecture, config, folder)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(
                f"timm cannot build {folder}; {type(error).__name__}: {' '.join(str(error).split())[:200]}; its "
                "configuration and weights do not belong together; get the checkpoint again"
            ) from error
        check_weights(module, folder)
        return module.eval()


def _origin(module: Any) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments ``module`` was created with.

    Raises:
        UnsupportedModelError: If its class is not supported, or timm did not create it.
    """
    kind = qualified_name(module)
    if kind not in _SUPPORTED:
        raise UnsupportedModelError(
            f"{kind} is not among the timm models that can be pruned; known: {', '.join(_SUPPORTED)}; write an adapter "
            "for it"
        )
    architecture = (getattr(module, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None or not hasattr(module, "_model_args"):
        raise UnsupportedModelError(
            f"this {type(module).__name__} does not say what it was created with, so it could not be built again; "
            "make it with timm.create_model (timm 1.0.31 or later)"
        )
    return architecture, {**module._model_args, **library("timm.models").get_model_args(module)}


def _containers(module: nn.Module) -> list[str]:
    kind = qualified_name(module)
    if kind == _RESNET:
        return list(_RESNET_STAGES)
    if kind == _TRANSFORMER:
        return ["blocks"]
    return [f"blocks.{name}" for name, _ in module.get_submodule("blocks").named_children()]


def _resnet_pin(module: nn.Module) -> Callable[[nn.Module], str | None]:
    first = (
        [next(iter(module.get_submodule(stage).children())) for stage in _RESNET_STAGES]
        if (qualified_name(module) == _RESNET)
        else []
    )

    def pin(layer: Any) -> str | None:
        if layer.downsample is not None or not keeps_shape(layer):
            return NO_SKIP
        return NO_EMPTY_STAGE if any(layer is one for one in first) else None

    return pin


def _transformer_pin(layer: Any) -> str | None:
    if type(layer).__name__ != "Block":
        return f"a {type(layer).__name__} is not known to hand its input on"
    if hasattr(layer.attn, "lambda_init"):
        return "its attention is scaled by the layer's number, which no argument of timm can say otherwise"
    return None


def _mobile_pin(layer: Any) -> str | None:
    return None if getattr(layer, "has_skip", False) and keeps_shape(layer) else NO_SKIP


def _kept_blocks(module: Any) -> list[list[int]]:
    """Numbers, within the whole model, of the blocks of each stage that are there."""
    known: list[list[int]] | None = getattr(module, _KEPT, None)
    return known if known is not None else [list(range(len(stage))) for stage in module.blocks]


def _cut(module: Any, kept: Sequence[Sequence[int]]) -> nn.Module:
    """Leave only the blocks ``kept`` in the stages of a whole model."""
    for number, places in enumerate(kept):
        module.blocks[number] = nn.Sequential(*(module.blocks[number][place] for place in places))
    setattr(module, _KEPT, [list(places) for places in kept])
    made: nn.Module = module
    return made


def _plain(timm: Any, folder: Path) -> nn.Module:
    module: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return module.to(_dtype(folder))


def _dtype(folder: Path) -> torch.dtype:
    """Of the stored weights; timm itself turns them all into float32."""
    from safetensors.torch import load_file

    stored = {tensor.dtype for tensor in load_file(folder / WEIGHTS_FILE).values() if tensor.is_floating_point()}
    return stored.pop() if len(stored) == 1 else torch.float32


def _with_kept(timm: Any, architecture: str, config: dict[str, Any], folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    whole = timm.create_model(architecture, **config.get("model_args", {}))
    if qualified_name(whole) not in _MOBILE or len(config[_KEPT]) != len(whole.blocks):
        raise ValueError(f"{_KEPT} does not fit the stages of {architecture}")
    module = _cut(whole, config[_KEPT])
    fill(module, load_file(folder / WEIGHTS_FILE), str(folder))
    any_module: Any = module
    any_module.pretrained_cfg = any_module.default_cfg = {
        **any_module.pretrained_cfg,
        **config["pretrained_cfg"],
        "architecture": architecture,
        "num_classes": config["num_classes"],
    }
    return module
