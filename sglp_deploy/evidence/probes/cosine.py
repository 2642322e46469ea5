"""How far each layer turns the residual stream: the cosine between what goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.hooks import RemovableHandle

from sglp_deploy.evidence.probes.base import Minibatch, Seen, hidden_into, hidden_of, numbers, zeros
from sglp_deploy.models.base import LayerStack


class CosineProbe:
    """Mean over tokens of cos(h_l, h_{l+1}); Block Influence (ShortGPT, arXiv:2403.03853) is one minus this."""

    name = "cosine"
    backward = False

    def attach(self, stack: LayerStack) -> Sequence[RemovableHandle]:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._stack = stack
        self._sum = np.zeros(stack.n_layers)
        handles = []
        for index, layer in enumerate(stack.layers):
            handles.append(layer.register_forward_pre_hook(self._entered, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._left(index)))
        return handles

    def begin(self, batch: Minibatch) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        self._valid = batch.valid
        self._cosine = zeros(self._stack, batch)

    def _entered(self, _layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._before = hidden_into(arguments, keywords).detach()

    def _left(self, index: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
            after = hidden_of(output).detach()
            cosine = nn.functional.cosine_similarity(self._before.float(), after.float(), dim=-1)
            self._cosine[index] = cosine[self._valid].sum()

        return hook

    def end(self, scale: float) -> None:
        """See :class:`sglp_deploy.evidence.probes.base.Probe`."""
        del scale
        self._sum += numbers(self._cosine)

    def result(self, seen: Seen) -> dict[str, NDArray[np.float64]]:
        """``cosine``, (L,)."""
        return {"cosine": self._sum / seen.n_tokens}
