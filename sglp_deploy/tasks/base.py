"""What the other stages ask about a kind of model: its data, its loss, its rows, its quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
    from sglp_deploy.models import LoadedModel

Progress = Callable[[int, int], None]

# Of quality.json, that can be read; what writes it says what changed.
QUALITY_VERSIONS: Final = (1, 2, 3)


def judged_models(quality: Mapping[str, Any]) -> dict[str, str]:
    """The models that a ``quality.json`` has figures of, by key, with the words for each; in the order they are made.

    Which steps changed weights is known since quality/3; before, it was a repair.
    """
    steps = quality.get("repairs") or (["repair"] if "unrepaired" in quality else [])
    first = "healing" if steps == ["heal"] else "repair"
    last = "healed" if "heal" in steps else "repaired"
    words = {
        "dense": "dense",
        "unrepaired": f"pruned, before {first}",
        "repaired": "pruned, repaired",
        "pruned": f"pruned, {last}" if "unrepaired" in quality or "repaired" in quality else "pruned",
    }
    return {name: said for name, said in words.items() if quality.get(name)}


class Task(Protocol):
    """A kind of model; every method works without knowing the family.

    A *batch* is what iterating over the batches of :meth:`encode` gives.

    Attributes:
        name: What plans call it.
    """

    name: str

    def refusal(self, module: nn.Module) -> str | None:
        """Why ``module`` is no model of this task ("has no next-token loss to measure by"), or None."""
        ...

    def encode(self, data: CalibrationSet, loaded: LoadedModel) -> TokenBatches:
        """Batches ready for the model.

        Raises:
            CalibrationError: If the data cannot be encoded, or are too few.
        """
        ...

    def held_out(self, **options: Any) -> CalibrationSet:
        """Data to judge by that no plan is made from; ``options`` are fields of the data set."""
        ...

    def check(self, module: nn.Module, batches: TokenBatches) -> None:
        """Refuse, before any work, data that belong to another model.

        Raises:
            UnsupportedModelError: If the model is not of this task.
            CalibrationError: If the data do not fit the model.
        """
        ...

    def loss(self, module: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Mean loss of one batch, a scalar with its graph, and the number of predictions it is a mean of.

        It is not finite where the weights or activations overflow; callers check.
        """
        ...

    def logits(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """What the model says of each prediction of one batch, shape (predictions, classes), before softmax."""
        ...

    def valid(self, batch: Any) -> NDArray[np.bool_]:
        """Which rows of a layer's output hold data and not padding, shape (batch, positions)."""
        ...

    def evaluate(self, module: nn.Module, batches: TokenBatches, *, progress: Progress | None = None) -> Any:
        """The quality figure of one model; two of them go to :meth:`compare`."""
        ...

    def compare(
        self,
        dense: Any,
        pruned: Any,
        batches: TokenBatches,
        source: str,
        *,
        unrepaired: Any = None,
        repaired: Any = None,
    ) -> dict[str, Any]:
        """What pruning cost, as ``quality.json`` holds it.

        ``unrepaired`` is the pruned model before repair and healing, ``repaired`` between the two.
        """
        ...

    def prompts(self, data: CalibrationSet, loaded: LoadedModel) -> NDArray[np.int64]:
        """Natural tokens, shape (n,), for the prompts of a certificate."""
        ...
