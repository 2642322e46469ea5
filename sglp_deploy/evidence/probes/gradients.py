"""What the loss says of each layer: norms of its gradients, reduced the moment they exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from sglp_deploy.evidence.probes.base import Minibatch, Seen, hidden_of, numbers, zeros
from sglp_deploy.models.base import LayerStack

_FIELDS = ("grad_l2", "grad_weight_sum", "grad_output", "taylor")


class GradientProbe:
    """GradNorm in three definitions and first-order Taylor (:mod:`sglp_deploy.importance` has their sources)."""

    name = "gradients"
    backward = True

    def attach(self, stack: LayerStack) -> Sequence[RemovableHandle]:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._stack = stack
        self._sums = {name: np.zeros(stack.n_layers) for name in _FIELDS}
        handles = []
        for index, layer in enumerate(stack.layers):
            handles.append(layer.register_forward_hook(self._left(index)))
            for parameter in layer.parameters():
                handle = parameter.register_post_accumulate_grad_hook(self._gradient(index))  # type: ignore[no-untyped-call]  # torch leaves it untyped
                handles.append(handle)
        return handles

    def begin(self, batch: Minibatch) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._valid = batch.valid
        self._square_sum = zeros(self._stack, batch, torch.float64)
        self._weight_sum = zeros(self._stack, batch, torch.float64)
        self._taylor = zeros(self._stack, batch, torch.float64)
        self._output = zeros(self._stack, batch)

    def _left(self, index: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            hidden = hidden_of(output)
            if hidden.requires_grad:
                hidden.register_hook(self._output_gradient(index))  # type: ignore[no-untyped-call]  # torch leaves it untyped

        return hook

    def _output_gradient(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            self._output[index] = torch.linalg.vector_norm(gradient[self._valid].float())

        return hook

    def _gradient(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            gradient = gradient.float()
            norm = torch.linalg.vector_norm(gradient).double()
            self._square_sum[index] = self._square_sum[index] + norm**2
            if parameter.ndim >= 2:
                self._weight_sum[index] = self._weight_sum[index] + norm
            product = (parameter.detach().float() * gradient).abs_()
            self._taylor[index] = self._taylor[index] + product.sum().double()
            parameter.grad = None  # reduced; freeing it here keeps one gradient alive and not the model's

        return hook

    def end(self, scale: float) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._sums["grad_l2"] += np.sqrt(numbers(self._square_sum)) / scale
        self._sums["grad_weight_sum"] += numbers(self._weight_sum) / scale
        self._sums["grad_output"] += numbers(self._output) / scale
        self._sums["taylor"] += numbers(self._taylor) / scale

    def result(self, seen: Seen) -> dict[str, NDArray[np.float64]]:
        """``grad_l2``, ``grad_weight_sum``, ``grad_output`` and ``taylor``, each (L,)."""
        return {name: value / seen.n_batches for name, value in self._sums.items()}
