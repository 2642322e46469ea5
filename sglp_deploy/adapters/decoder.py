"""Decoder language models: the layer stack, and a configuration in which every per-layer entry matches what is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglp_deploy.adapters.base import LayerStack
from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# A family is listed once its tests have pruned, reloaded, decoded and exported it.
SUPPORTED_MODEL_TYPES = ("gemma3_text", "llama", "qwen2", "qwen3")

_STACK_PATH = "model.layers"

# Lists whose length may equal the depth by accident and that have nothing to do with layers.
_NOT_PER_LAYER = {"architectures", "id2label", "label2id", "eos_token_id", "bad_words_ids"}


def layer_stack(model: PreTrainedModel) -> LayerStack:
    """Find the ordered decoder layers of ``model``.

    Raises:
        UnsupportedModelError: If the family is not supported or the stack disagrees with the configuration.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; its per-layer configuration is unknown here and guessing it "
            f"makes silently wrong models; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    try:
        modules = model.get_submodule(_STACK_PATH)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {_STACK_PATH}; a causal language model with a head was expected; "
            "load it with AutoModelForCausalLM"
        ) from None
    depth = model.config.num_hidden_layers
    if len(modules) != depth:
        raise UnsupportedModelError(
            f"{_STACK_PATH} holds {len(modules)} layers but num_hidden_layers says {depth}; the checkpoint is "
            "inconsistent; repair its config.json"
        )
    names = tuple(f"{_STACK_PATH}.{index}" for index in range(depth))
    return LayerStack(_STACK_PATH, names, tuple(modules), (True,) * depth)


def pruned_config(config: PretrainedConfig, keep: Sequence[int]) -> PretrainedConfig:
    """A copy of ``config`` for the layers ``keep``, with every per-layer entry sliced by surviving index.

    Generic rule: a list or tuple as long as the old depth is per-layer.  ``max_window_layers`` (Qwen2, Qwen3: the
    first that many layers attend fully) becomes the number of kept layers below it, which is exact because ``keep``
    is rising.

    Args:
        config: Configuration of the unpruned model.
        keep: Old indices of the layers to keep; rising, except when an exporter repeats a layer to trace it.

    Returns:
        A new configuration; ``config`` is left as it is.
    """
    depth = config.num_hidden_layers
    new = copy.deepcopy(config)
    # Length and lists are set together behind the validator's back: it would refuse every intermediate state.
    changes: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth and name not in _NOT_PER_LAYER:
            changes[name] = type(value)(value[index] for index in keep)
    if isinstance(getattr(config, "max_window_layers", None), int):
        changes["max_window_layers"] = sum(index < config.max_window_layers for index in keep)
    vars(new).update(changes)
    new.validate()
    return new
