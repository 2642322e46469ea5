"""Where a layer adds to the residual stream, found by running it and proven by arithmetic instead of by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from sglp_deploy.errors import UnsupportedModelError

# What a layer's output may differ by from the sum of its parts, relative to what the layer adds; rounding of each type.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Branch:
    """One of the sums of a layer: ``stream + scale * norm(projection(x))``.

    Attributes:
        path: Of the module whose output is added, inside the layer.
        projection: Of the linear map that makes it, or None where no single one does (a mixture of experts).
        norm: Of the norm between the two, or None.
        scale: What the sum is multiplied by before it is added.
    """

    path: str
    projection: str | None
    norm: str | None
    scale: float


def find_branches(layer: nn.Module, run: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Branch, Branch]:
    """The two branches of a layer (attention, MLP), in the order in which they run.

    Args:
        layer: A layer with a residual stream.
        run: Runs the layer once; gives what it was given and what it returned.

    Raises:
        UnsupportedModelError: If its output is not its input plus the outputs of two of its modules.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # input and output, in order of completion

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            made = output[0] if isinstance(output, tuple) and output else output
            if isinstance(made, torch.Tensor) and arguments and isinstance(arguments[0], torch.Tensor):
                seen[path] = (arguments[0].detach(), made.detach())

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in layer.named_modules() if path]
    try:
        given, returned = run()
    finally:
        for handle in handles:
            handle.remove()
    added = (returned - given).flatten().double()
    # Some layers flatten batch and positions for their MLP.
    made = {
        path: out
        for path, (_, out) in seen.items()
        if out.shape[-1:] == given.shape[-1:] and out.numel() == given.numel()
    }
    for first, second in combinations(made, 2):
        if first.startswith(f"{second}.") or second.startswith(f"{first}."):
            continue  # one lies in the other
        total = made[first].flatten().double() + made[second].flatten().double()
        scale = float(total @ added / (total @ total)) if total.any() else 0.0
        gap = float((added - scale * total).norm() / added.norm().clamp(min=1e-30))
        if scale and gap <= _ROUNDING[given.dtype]:
            return _branch(layer, seen, first, scale), _branch(layer, seen, second, scale)
    raise UnsupportedModelError(
        f"a {type(layer).__name__} does not add the outputs of two of its modules to what it is given (a norm behind "
        "the sum, or sublayers of another form); no repair can be folded into it; use the plan as it is (repair 'none')"
    )


def _branch(layer: nn.Module, seen: dict[str, tuple[torch.Tensor, torch.Tensor]], path: str, scale: float) -> Branch:
    given, made = seen[path]
    if is_linear(layer.get_submodule(path)):
        return Branch(path, path, None, scale)
    for other, (_, out) in seen.items():
        if is_linear(layer.get_submodule(other)) and out.shape == made.shape:
            if torch.equal(out, made):  # a block (attention, MLP) that returns what its last map gives
                return Branch(path, other, None, scale)
            if (
                other != path
                and torch.equal(out, given)
                and layer.get_submodule(path)._parameters.get("weight") is not None
            ):
                return Branch(path, other, path, scale)
    return Branch(path, None, None, scale)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map whose weight this package can fit: ``nn.Linear``, or GPT-2's Conv1D."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def weight_of(projection: nn.Module) -> torch.Tensor:
    """The map as (outputs, inputs), whichever way round the module keeps it."""
    weight = projection.get_parameter("weight")
    return weight.T if type(projection).__name__ == "Conv1D" else weight


def as_stored(projection: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`weight_of`, in the module's own element type."""
    turned = weight.T if type(projection).__name__ == "Conv1D" else weight
    return turned.to(projection.get_parameter("weight").dtype).contiguous()


def with_bias(projection: nn.Module) -> torch.Tensor:
    """Map and bias as one (inputs + 1, outputs), float64; without the last row where there is no bias."""
    weight = weight_of(projection).detach().double().T
    bias = projection._parameters.get("bias")
    return weight if bias is None else torch.cat([weight, bias.detach().double()[None]])


def inputs_of(projection: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """What :func:`with_bias` multiplies: rows of inputs, float32, and a column of ones where there is a bias."""
    rows = flat(given).float()
    if projection._parameters.get("bias") is None:
        return rows
    return torch.cat([rows, torch.ones(len(rows), 1, device=rows.device)], 1)


@contextmanager
def watching(
    layer: nn.Module, paths: Sequence[str], seen: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Keep the input and the output of modules of a layer in ``seen``, by path, while it runs."""

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            given = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else made
            seen[path] = (given.detach(), made.detach())

        return hook

    with ExitStack() as cleanup:
        for path in dict.fromkeys(paths):
            cleanup.callback(layer.get_submodule(path).register_forward_hook(keep(path)).remove)
        yield


def flat(values: torch.Tensor) -> torch.Tensor:
    """(rows, channels) of hidden states that may have kept batch and positions apart."""
    return values.reshape(-1, values.shape[-1])
