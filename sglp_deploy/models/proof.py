"""Proof by experiment that an undeclared family is pruned right: rebuild it and compare with layers passed over."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from sglp_deploy.artifact import BEYOND_WINDOW
from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.models.base import LayerStack
from sglp_deploy.models.library import layer_stack
from sglp_deploy.models.quiet import quiet_libraries
from sglp_deploy.models.samples import attention_window, sample_inputs
from sglp_deploy.models.settings import check_settings

if TYPE_CHECKING:
    from sglp_deploy.overlay import Overlay

_LONGEST = 1024  # tokens; a longer window is not gone beyond, but the settings of its layers are compared all the same
# Rebuilt and original run the same operations on the same numbers; what is left is the order of a few sums.
_RELATIVE = 1e-4


def prove(
    module: nn.Module, pruned: nn.Module, stack: LayerStack, keep: Sequence[int], overlay: Overlay | None = None
) -> None:
    """Compare a model rebuilt from the pruned configuration with ``module`` whose other layers hand their input on.

    Args:
        module: The unpruned model.
        pruned: The pruned one, with the overlay's tensors in it.
        stack: The layers of ``module``.
        keep: Those that stay.
        overlay: Put into ``module`` for the comparison.

    Raises:
        UnsupportedModelError: If it cannot be rebuilt or run, or computes something else.
    """
    config: Any = pruned.config
    family = f"model type {config.model_type!r} is not declared"
    try:
        with quiet_libraries():
            rebuilt = type(pruned)(copy.deepcopy(config)).to(next(pruned.parameters()).dtype).eval()
            rebuilt.load_state_dict(pruned.state_dict(), strict=True)
        rebuilt = rebuilt.to(next(pruned.parameters()).device)
        inputs = sample_inputs(module, tokens=_length(config))
        with torch.no_grad(), overlaid(module, overlay), passed_over(stack, keep):
            wanted = outputs(module(**inputs))
        with torch.no_grad():
            got = outputs(rebuilt(**inputs))
    except Exception as error:
        raise UnsupportedModelError(
            f"{family}, and proving it on a rebuilt model failed; {type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}; write an adapter for this family"
        ) from error
    for name, reference in wanted.items():
        size = float(reference.abs().max())
        found = got.get(name)
        alike = found is not None and found.shape == reference.shape
        gap = float((reference - found).abs().max()) if found is not None and alike else float("inf")
        if not gap <= _RELATIVE * size:
            raise UnsupportedModelError(
                f"{family}, and a model rebuilt from the pruned configuration computes something else than the "
                f"original with the removed layers passed over ({name}: largest difference {gap:.3g} of {size:.3g}); "
                "some entry derives a layer's behaviour from its number; write an adapter for this family"
            )


def check_rebuild(pruned: nn.Module, stack: str | None) -> None:
    """Build ``pruned`` again from its configuration alone, without weights, and compare every layer's settings.

    Needs no memory and no pass through the model: a configuration that means other layers never gets as far as a file
    or a graph.

    Raises:
        UnsupportedModelError: If the configuration describes no model, or one of other layers altogether.
        ArtifactError: If a layer has other settings or another number than its configuration gives it.
    """
    config: Any = pruned.config
    try:
        with quiet_libraries(), torch.device("meta"):
            rebuilt: nn.Module = type(pruned)(copy.deepcopy(config)).eval()
    except Exception as error:
        raise UnsupportedModelError(
            f"no model can be built from the configuration of the pruned {config.model_type}; {type(error).__name__}: "
            f"{(str(error).strip() or 'no message').splitlines()[0]}; report this as a bug"
        ) from error
    dtypes = {name: parameter.dtype for name, parameter in pruned.named_parameters()}
    for name, parameter in rebuilt.named_parameters():
        if name in dtypes:  # what is missing or left over shows in the layers' shapes
            parameter.data = parameter.data.to(dtypes[name])
    check_settings(layer_stack(rebuilt, stack).layers, layer_stack(pruned, stack).layers)


def outputs(output: Any) -> Mapping[str, torch.Tensor]:
    """The float tensors a model returns, by name."""
    if isinstance(output, torch.Tensor):
        return {"output": output}
    named = output.items() if hasattr(output, "items") else ()
    return {name: value for name, value in named if isinstance(value, torch.Tensor) and value.is_floating_point()}


@contextmanager
def passed_over(stack: LayerStack, keep: Sequence[int]) -> Iterator[None]:
    """The layers outside ``keep`` run and then hand on the hidden state they were given."""

    def hand_on(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        given = arguments[0] if arguments else keywords["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handles = [
        layer.register_forward_hook(hand_on, with_kwargs=True)
        for index, layer in enumerate(stack.layers)
        if index not in set(keep)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def overlaid(module: nn.Module, overlay: Overlay | None) -> Iterator[None]:
    """The unpruned ``module`` computes with the overlay's tensors, each under its own name, and then as before.

    It shares nothing with the way :mod:`sglp_deploy.materialize` puts them into the pruned model, which keeps its own
    parameters meanwhile: the values are exchanged here, not the parameters.
    """
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        if overlay is not None:
            there: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
            there |= dict(module.named_buffers(remove_duplicate=False))
            for name, tensor in overlay.tensors.items():
                own = there[name]
                before.append((own, own.data))
                own.data = tensor.to(own.device)
        yield
    finally:
        for own, data in reversed(before):  # both names of a tie may have been given
            own.data = data


def _length(config: Any) -> int:
    """Tokens to run: past the longest window there is, as far as that is affordable."""
    positions = cast(int, getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST)
    return min((attention_window(config) or 0) + BEYOND_WINDOW, _LONGEST, positions)
