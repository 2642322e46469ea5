"""Low-rank matrices beside the linear maps of the layers (LoRA, through peft), merged when training is over.

Merged, they leave no operator and no parameter behind.  So every runtime loads the model as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglp_deploy.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from sglp_deploy.models import LayerStack

_ADAPTER = "healing"


def low_rank(
    module: nn.Module, stack: LayerStack, names: Mapping[str, str], *, rank: int, seed: int
) -> tuple[dict[str, str], dict[str, nn.Parameter]]:
    """Put low-rank matrices beside the linear maps of the layers.

    Args:
        module: Altered.
        stack: Its layers.
        names: Of weights that may change, with their names in the unpruned model.
        rank: Of the matrices.
        seed: Of their first values; the model computes the same before training.

    Returns:
        The weights that merging will change, as ``names`` has them, and the parameters to train.

    Raises:
        ConfigError: If peft is not installed.
        UnsupportedModelError: If the layers hold no linear map.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "lora needs the package peft; it is not installed; pip install 'sglp-deploy[heal]', or train all weights "
            "(lora=0)"
        ) from None
    from transformers.pytorch_utils import Conv1D

    prefixes = tuple(f"{layer}." for layer in stack.names)
    kinds = (nn.Linear, Conv1D)
    maps = {
        path: one
        for path, one in module.named_modules()
        if path.startswith(prefixes) and isinstance(one, kinds) and f"{path}.weight" in names
    }
    if not maps:
        raise UnsupportedModelError(
            f"the layers of {type(module).__name__} hold no linear map of torch's; LoRA has nothing to stand beside; "
            "train all weights (lora=0)"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(maps),
        fan_in_fan_out=all(isinstance(one, Conv1D) for one in maps.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    trained = {name: one for name, one in module.named_parameters() if "lora_" in name}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    return {f"{path}.weight": names[f"{path}.weight"] for path in maps}, trained


def merge(module: nn.Module) -> None:
    """Add the products to the weights they stand beside, and take the matrices out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            tuned: Any = layer
            tuned.merge()
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, tuned.get_base_layer())
