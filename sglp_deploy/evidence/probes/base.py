"""What a calibration pass and a probe owe each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from sglp_deploy.evidence.hsic import LEAST_ROWS
from sglp_deploy.models.base import LayerStack


@dataclass(frozen=True)
class Minibatch:
    """What a probe may know of the minibatch that is about to run.

    Attributes:
        valid: Which positions hold data and not padding, shape (batch, positions), bool, on the model's device.
        chosen: Flat indices of the rows that enter the similarity, on the model's device.
        rows: "rms" or "raw": how those rows are scaled.
    """

    valid: torch.Tensor
    chosen: torch.Tensor
    rows: str

    @property
    def comparable(self) -> bool:
        """Whether there are rows enough for the similarity."""
        return len(self.chosen) >= LEAST_ROWS


@dataclass(frozen=True)
class Seen:
    """What went through the model in the whole pass.

    Attributes:
        n_batches: Minibatches.
        n_compared: Minibatches that had rows enough for the similarity.
        n_tokens: Positions that held data.
    """

    n_batches: int
    n_compared: int
    n_tokens: int


class Probe(Protocol):
    """Looks at every layer while minibatches run, and keeps sums and nothing else.

    Attributes:
        name: What planners ask for it by.
        backward: Whether it needs the gradient of the task's loss.
    """

    name: str
    backward: bool

    def attach(self, stack: LayerStack) -> Sequence[RemovableHandle]:
        """Register hooks on the layers; the pass removes them."""
        ...

    def begin(self, batch: Minibatch) -> None:
        """A minibatch is about to run; reductions of one minibatch start at zero."""
        ...

    def end(self, scale: float) -> None:
        """Fold the minibatch into the sums; gradients are those of ``scale`` times the loss."""
        ...

    def result(self, seen: Seen) -> dict[str, NDArray[np.float64]]:
        """Fields of :class:`sglp_deploy.evidence.statistics.LayerStats`, each (L,) or (L, L)."""
        ...


def hidden_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The hidden state among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def hidden_into(arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> torch.Tensor:
    """The hidden state among what a layer is given."""
    return arguments[0] if arguments else keywords["hidden_states"]


def numbers(values: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Scalars on a device as one float64 array; waits for the device once."""
    return np.asarray(torch.stack(list(values)).double().cpu().numpy())


def zeros(stack: LayerStack, batch: Minibatch, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A scalar zero for each layer, on the model's device: reading one would wait for an accelerator each time."""
    return [torch.zeros((), device=batch.valid.device, dtype=dtype)] * stack.n_layers
