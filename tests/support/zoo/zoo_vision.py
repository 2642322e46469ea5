"""Tiny random image classifiers of transformers, each with images of the size its configuration names.

Non-square images wherever the family takes them: height and width mixed up would otherwise pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from zoo import Specimen

N_LABELS = 7  # no depth, no number of stages and no width of these models is 7
NON_SQUARE = (48, 64)
NormLayer = nn.modules.batchnorm._BatchNorm


def images(size: int | tuple[int, int] | list[int], rows: int, seed: int) -> torch.Tensor:
    """Random images of ``size`` (one number for a square, else height and width), shape (rows, 3, height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def enliven(module: nn.Module, sample: torch.Tensor, *, gain: float = 1.0) -> nn.Module:
    """Give a fresh network weights that make every layer matter, and batch norms statistics of their own.

    A convolution starts with a spread that fits its fan-in, so that a signal passes any depth.  What starts as a
    constant (norms, biases, position tables, layer scales) gets noise, or a test would not see two of them mixed up.
    Batch norms then take their running statistics from ``sample``, as training would have left them.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 4:
                parameter.copy_(torch.randn_like(parameter) * gain / parameter[0].numel() ** 0.5)
            elif parameter.ndim == 1 or bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        norms = [part for part in module.modules() if isinstance(part, NormLayer)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain mean over all batches seen
        if norms:
            module(sample)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for number, norm in enumerate(norms):
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(100 + number)  # unused in evaluation, but part of the checkpoint
    return module.eval()


def _build(
    kind: type[PreTrainedModel], settings: Callable[[], PretrainedConfig], size: int | tuple[int, int], gain: float
) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return enliven(kind(settings()).eval(), images(size, 16, 1), gain=gain)

    return build


def _specimen(
    name: str,
    kind: type[PreTrainedModel],
    settings: type[PretrainedConfig],
    facts: dict[str, Any],
    keep: tuple[int, ...],
    *,
    size: int | tuple[int, int] = NON_SQUARE,
    gain: float = 1.0,
    note: str = "",
) -> Specimen:
    def inputs(_module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": images(size, 2, seed)}

    build = _build(kind, lambda: settings(**facts, num_labels=N_LABELS), size, gain)
    return Specimen(name, "vision", build, {"layers": keep}, inputs, note=note)


_TRANSFORMER = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": NON_SQUARE,
    "patch_size": 8,
    "initializer_range": 0.1,
}
_SWIN = {
    "image_size": NON_SQUARE,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 6, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.1,
    "initializer_range": 0.1,
}
_CONVNEXT = {
    "image_size": NON_SQUARE,
    "patch_size": 4,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [2, 2, 4, 2],
    "drop_path_rate": 0.1,
    "initializer_range": 0.1,
}
_RESNET = {"embedding_size": 16, "depths": [2, 3, 4, 2]}

SPECIMENS: tuple[Specimen, ...] = (
    _specimen("vit", ViTForImageClassification, ViTConfig, _TRANSFORMER | {"intermediate_size": 96}, (0, 2, 3, 5)),
    _specimen("deit", DeiTForImageClassification, DeiTConfig, _TRANSFORMER | {"intermediate_size": 96}, (1, 2, 5)),
    _specimen(
        "dinov2",
        Dinov2ForImageClassification,
        Dinov2Config,
        _TRANSFORMER | {"mlp_ratio": 2, "image_size": 48},
        (0, 2, 3, 5),
        size=48,  # its table of positions must be square
        note="each layer is a stage of its own: stage_names is one longer than the depth, out_features names the last",
    ),
    _specimen(
        "dinov2-with-registers",
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        _TRANSFORMER | {"mlp_ratio": 2, "image_size": 48},
        (1, 2, 5),
        size=48,
        note="as dinov2, with four more tokens",
    ),
    _specimen(
        "swin",
        SwinForImageClassification,
        SwinConfig,
        _SWIN,
        (0, 1, 2, 5, 6, 7, 8),
        note=(
            "odd layers of a stage shift their windows: a kept layer needs a place of its old parity; stages are "
            "24x32, 12x16 and 6x8, all wider than the window of 4, so the shift matters everywhere"
        ),
    ),
    _specimen(
        "swinv2",
        Swinv2ForImageClassification,
        Swinv2Config,
        _SWIN,
        (0, 1, 2, 3, 6, 7, 8),
        note="as swin, but it fits windows to the stage when it is built",
    ),
    _specimen(
        "convnext",
        ConvNextForImageClassification,
        ConvNextConfig,
        _CONVNEXT | {"layer_scale_init_value": 0.5},
        (1, 2, 4, 7, 9),
        note="downsampling lies beside the layers of a stage, so its first layer may go",
    ),
    _specimen(
        "convnextv2",
        ConvNextV2ForImageClassification,
        ConvNextV2Config,
        _CONVNEXT,
        (0, 3, 4, 6, 8),
        note="as convnext",
    ),
    _specimen(
        "resnet",
        ResNetForImageClassification,
        ResNetConfig,
        _RESNET | {"hidden_sizes": [32, 64, 96, 128], "layer_type": "bottleneck"},
        (0, 2, 4, 5, 6, 8, 9),
        note="the first layer of each stage changes the shape; ResNetConfig.layer_types is a class attribute, no list",
    ),
    _specimen(
        "resnet-basic",
        ResNetForImageClassification,
        ResNetConfig,
        _RESNET | {"hidden_sizes": [16, 24, 32, 48], "layer_type": "basic"},
        (0, 2, 4, 5, 7, 8, 9),
        note="as in ResNet-18 the stem is as wide as the first stage, so even layer 0 keeps the shape",
    ),
    _specimen(
        "efficientnet",
        EfficientNetForImageClassification,
        EfficientNetConfig,
        {
            "image_size": 64,
            "width_coefficient": 0.5,
            "depth_coefficient": 1.4,
            "hidden_dim": 640,
            "in_channels": [32, 16, 24, 40],
            "out_channels": [16, 24, 40, 80],
            "kernel_sizes": [3, 3, 5, 3],
            "strides": [1, 2, 2, 2],
            "expand_ratios": [1, 6, 6, 6],
            "num_block_repeats": [1, 2, 2, 3],
            "depthwise_padding": [5, 8],
            "initializer_range": 0.1,
        },
        (0, 2, 4, 5, 6, 8, 10, 11),
        size=64,
        gain=1.4,
        note=(
            "the depth of a stage is ceil(depth_coefficient * num_block_repeats); depthwise_padding holds layer "
            "numbers; the first layer of a stage has no skip connection"
        ),
    ),
)


def mobilenet_v2() -> nn.Module:
    """MobileNet-v2 as transformers has it: 16 layers written into its code, so no folder can hold fewer."""
    settings = {"image_size": NON_SQUARE, "depth_multiplier": 0.35, "finegrained_output": False}
    return _build(
        MobileNetV2ForImageClassification,
        lambda: MobileNetV2Config(**settings, num_labels=N_LABELS),
        NON_SQUARE,
        1.4,
    )()
