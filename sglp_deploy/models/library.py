"""Which adapter a model or a folder belongs to: third parties first, then ours; imported when they are asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import MissingDependencyError, UnsupportedModelError
from sglp_deploy.models.base import Adapter, LayerStack

if TYPE_CHECKING:
    from torch import nn

GROUP = "sglp_deploy.adapters"
_MEMBERS = [name for name in (*Adapter.__annotations__, *vars(Adapter)) if not name.startswith("_")]

_BUILTIN: Mapping[str, str] = {
    "transformers": "sglp_deploy.models.transformers.adapter:TransformersAdapter",
    "timm": "sglp_deploy.models.vision.timm:TimmAdapter",
    "torchvision": "sglp_deploy.models.vision.torchvision:TorchvisionAdapter",
}


def adapter_for(module: nn.Module) -> Adapter:
    """The adapter whose library ``module`` comes from.

    Raises:
        UnsupportedModelError: If no adapter knows it; the message lists those that were asked.
        MissingDependencyError: If an installed third-party adapter cannot be loaded.
    """
    asked = []
    for adapter in _adapters():
        if adapter.matches(module):
            return adapter
        asked.append(adapter.name)
    raise UnsupportedModelError(
        f"{type(module).__module__}.{type(module).__qualname__} is a model of none of the known libraries; asked: "
        f"{', '.join(asked)}; an adapter for another one is added under the entry-point group {GROUP!r}"
    )


def adapter_of_folder(folder: Path) -> Adapter | None:
    """The adapter that reads the checkpoint in ``folder``, or None."""
    return next((adapter for adapter in _adapters() if adapter.owns(folder)), None)


def layer_stacks(module: nn.Module) -> tuple[LayerStack, ...]:
    """Every stack of ``module``; more than one for an encoder-decoder.

    Raises:
        UnsupportedModelError: If it has no stack that can be pruned safely.
    """
    return adapter_for(module).stacks(module)


def layer_stack(module: nn.Module, name: str | None = None) -> LayerStack:
    """One stack of ``module``.

    Args:
        module: The model.
        name: A stack's path or side ("encoder", "decoder"); the first stack when omitted.

    Raises:
        UnsupportedModelError: If the model has no stack that can be pruned safely.
        ConfigError: If it has none of that name.
    """
    stacks = layer_stacks(module)
    if name is None:
        return stacks[0]
    for stack in stacks:
        if name in (stack.path, stack.side):
            return stack
    raise unknown_name("layer stack", name, [stack.side if len(stacks) > 1 else stack.path for stack in stacks])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, and as it was afterwards: dropout would make a measurement depend on chance."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def parameter_sizes(module: nn.Module, stack: LayerStack) -> dict[str, Any]:
    """Parameter counts as plans record them: ``parameters``, ``layer_parameters`` (L) and ``head_parameters``.

    A speedup's ceiling is worked out from them; tied parameters are counted once in ``parameters``.
    """
    find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
    head = find_head()
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "layer_parameters": [sum(p.numel() for p in layer.parameters()) for layer in stack.layers],
        "head_parameters": 0 if head is None else sum(p.numel() for p in head.parameters()),
    }


def _adapters() -> Iterator[Adapter]:
    for entry in metadata.entry_points(group=GROUP):
        if entry.name not in _BUILTIN:  # a third party may add, not replace
            try:
                adapter = entry.load()()
                if lacking := [name for name in _MEMBERS if not hasattr(adapter, name)]:
                    raise TypeError(f"it lacks {', '.join(lacking)}")
            except Exception as error:
                raise MissingDependencyError(
                    f"the adapter {entry.name!r} ({entry.value}) cannot be loaded; {type(error).__name__}: {error}; "
                    "reinstall or remove the package it comes from"
                ) from error
            yield cast(Adapter, adapter)
    for target in _BUILTIN.values():
        module, _, attribute = target.partition(":")
        yield cast(Adapter, getattr(importlib.import_module(module), attribute)())
