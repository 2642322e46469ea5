"""How alike the outputs of every two layers are: HSIC terms of one minibatch's rows, summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.hsic import hsic_terms
from sglp_deploy.evidence.probes.base import Minibatch, Seen, hidden_of
from sglp_deploy.models.base import LayerStack

_EPS = torch.finfo(torch.float32).eps  # equal tokens give bit-equal rows in any shorter type


class CkaProbe:
    """One Gram matrix for each layer and minibatch; all of them become one (L, L) increment and are forgotten."""

    name = "cka"
    backward = False

    def attach(self, stack: LayerStack) -> Sequence[RemovableHandle]:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._stack = stack
        self._sums = {
            name: np.zeros((stack.n_layers, stack.n_layers))
            for name in ("hsic_unbiased", "hsic_biased", "cka_batch_mean")
        }
        return [layer.register_forward_hook(self._left(index)) for index, layer in enumerate(stack.layers)]

    def begin(self, batch: Minibatch) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._batch = batch
        self._grams: list[torch.Tensor | None] = [None] * self._stack.n_layers

    def _left(self, index: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            if not self._batch.comparable:
                return
            after = hidden_of(output).detach()
            # In float64: centring subtracts what the rows have in common, which can be nearly all of them.
            picked = after.reshape(-1, after.shape[-1])[self._batch.chosen].double()
            if self._batch.rows == "rms":
                picked = picked * torch.rsqrt(picked.pow(2).mean(-1, keepdim=True) + 1e-12)
            self._grams[index] = picked @ picked.T

        return hook

    def end(self, scale: float) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`.

        Raises:
            CalibrationError: If a layer's output does not vary over the rows.
        """
        del scale
        if any(gram is None for gram in self._grams):
            return
        grams = torch.stack([gram for gram in self._grams if gram is not None]).cpu().numpy()
        unbiased, biased = hsic_terms(grams)
        self._sums["hsic_unbiased"] += unbiased
        self._sums["hsic_biased"] += biased
        own = np.diag(unbiased)
        # What rounding alone leaves of equal rows: deviations of a few eps of their size, squared by the Gram matrix.
        size = np.diagonal(grams, axis1=1, axis2=2).mean(axis=1)
        constant = own <= ((8 * _EPS) ** 2 * size) ** 2
        if constant.any():
            layer = int(np.argmax(constant))
            raise CalibrationError(
                f"layer {layer} ({self._stack.names[layer]}) gives the same output for every token of a minibatch; its "
                "similarity to other layers is undefined; give longer text, or check the checkpoint"
            )
        self._sums["cka_batch_mean"] += unbiased / np.sqrt(np.outer(own, own))

    def result(self, seen: Seen) -> dict[str, NDArray[np.float64]]:
        """``hsic_unbiased``, ``hsic_biased`` and ``cka_batch_mean``, each (L, L)."""
        return {**self._sums, "cka_batch_mean": self._sums["cka_batch_mean"] / seen.n_compared}
