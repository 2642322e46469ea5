"""What a depth-pruning method is given and what it gives back; a third party implements :class:`Planner`.

Nothing here knows torch.  A method sees numbers.  It sees the model only through :class:`Evidence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.errors import PlanError
from sglp_deploy.evidence.statistics import GapDamage, LayerStats
from sglp_deploy.planners.budget import Budget, LayerFacts

Matrix = tuple[tuple[float, ...], ...]
Groups = tuple[tuple[int, ...], ...]


class Evidence(LayerFacts, Protocol):
    """What a planner may look at, beside the facts of the layers; measured when it is asked for, and kept."""

    @property
    def seed(self) -> int:
        """For methods that draw at random."""
        ...

    @property
    def stats(self) -> LayerStats:
        """What every probe says, from one streaming pass over the calibration rows."""
        ...

    def measured(self, *probes: str) -> LayerStats:
        """What these probes say ("cka", "cosine", "gradients"); a pass that held them already is not repeated."""
        ...

    def loss_without(self, layers: Sequence[int] = ()) -> float:
        """Mean loss on the calibration rows with ``layers`` passed over, nats per prediction."""
        ...

    def gap_damage(self, longest: int, *, precision: str = "auto") -> GapDamage:
        """What every gap of up to ``longest`` layers does to the predictions after the layer before it is fitted.

        Matrices are multiplied in ``precision``: "fp32", "bf16", or "auto" (bf16 where the processor multiplies it).
        """
        ...

    def damage_repaired(self, plans: Sequence[Sequence[int]], *, precision: str = "auto") -> list[float]:
        """What each plan does to the predictions with the layer before each of its gaps fitted."""
        ...

    def hidden(
        self, boundaries: Sequence[int], *, without: Sequence[int] = ()
    ) -> Iterator[dict[int, NDArray[np.float32]]]:
        """The residual stream at boundaries 0 to L, minibatch by minibatch: boundary to rows (tokens, width)."""
        ...

    def weights(self, layer: int) -> Mapping[str, Any]:
        """The tensors of one layer under their names in the unpruned model; for methods that merge, which copy them."""
        ...

    def record(self) -> dict[str, Any]:
        """What this view has looked at, for the plan: ``counts``, ``options`` and ``elapsed_s``."""
        ...

    def view(self, groups: Sequence[Sequence[int]] = ()) -> Evidence:
        """The same evidence for one decision, whose layers can only go together in ``groups``.

        What was measured before is shared; the record begins anew, so that a plan says what its own decision rests on.
        """
        ...


@dataclass(frozen=True)
class LayerDecision:
    """What a planner decided, before it is bound to a model and a calibration set.

    Attributes:
        drop: Layers to remove, in any order.
        segments: Half-open ranges that cover the layers; one range for a method without segments.
        segment_losses: Optimal loss for K = 1 ... L, or empty.
        criterion: The key of ``scores`` that ranked the layers.
        scores: Layer scores by criterion, each (L).
        quota: How removals were shared between segments, or None.
        similarity: CKA between layers, or None for a method that uses none.
        elapsed_s: Wall time by stage.
        weights: Tensors the method changes, under their names in the unpruned model, or None; they become the plan's
            overlay (:mod:`sglp_deploy.overlay`).  Numpy arrays will do.
        weights_record: What the plan says of them beside the planner's name: the held-out loss before and after.
    """

    drop: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    segment_losses: tuple[float, ...] = ()
    criterion: str | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    quota: str | None = None
    similarity: Matrix | None = None
    elapsed_s: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Any] | None = None
    weights_record: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Planner(Protocol):
    """A depth-pruning method.

    Attributes:
        name: What users call it; the registry's or the entry point's name.
        source: The paper, or where else the rule comes from.
        Options: A frozen dataclass of what a caller may ask of it, each field with a default; its ``__post_init__``
            may raise :class:`sglp_deploy.errors.ConfigError`.
    """

    name: str
    source: str
    Options: type

    def decide(self, evidence: Evidence, budget: Budget, options: Any) -> LayerDecision:
        """Decide which layers go; :func:`sglp_deploy.planners.budget.resolve_drops` answers any kind of budget.

        Args:
            evidence: What may be looked at.
            budget: How much to remove.
            options: An instance of ``Options``.

        Raises:
            PlanError: If the budget cannot be met.
            CalibrationError: If the evidence cannot support a plan.
        """
        ...


@dataclass(frozen=True)
class NoOptions:
    """For a planner that takes none."""


@dataclass(frozen=True)
class FixedEvidence:
    """Statistics that were taken before, without a model to ask more of."""

    stats: LayerStats
    seed: int = 0
    groups: Groups = ()

    @property
    def n_layers(self) -> int:
        """L."""
        return self.stats.n_layers

    @property
    def prunable(self) -> tuple[bool, ...]:
        """Whether each layer may be removed (L)."""
        return self.stats.prunable

    @property
    def parameters(self) -> NDArray[np.int64]:
        """Parameters in each layer (L)."""
        return self.stats.parameters

    @property
    def other_parameters(self) -> int:
        """Parameters outside the layers."""
        return self.stats.other_parameters

    def measured(self, *probes: str) -> LayerStats:
        """The statistics there are; reading what no probe took is refused by :meth:`LayerStats.need`."""
        del probes
        return self.stats

    def loss_without(self, layers: Sequence[int] = ()) -> float:
        """Only the loss of the whole model is known.

        Raises:
            PlanError: If any layer is to be passed over.
        """
        if layers:
            raise self._needs_model("the loss without some layers")
        return self.stats.loss

    def gap_damage(self, longest: int, *, precision: str = "auto") -> GapDamage:
        """Not known without a model.

        Raises:
            PlanError: Always.
        """
        del longest, precision
        raise self._needs_model("losses of repaired gaps")

    def damage_repaired(self, plans: Sequence[Sequence[int]], *, precision: str = "auto") -> list[float]:
        """Not known without a model.

        Raises:
            PlanError: Always.
        """
        del plans, precision
        raise self._needs_model("losses of repaired plans")

    def hidden(
        self, boundaries: Sequence[int], *, without: Sequence[int] = ()
    ) -> Iterator[dict[int, NDArray[np.float32]]]:
        """Not known without a model.

        Raises:
            PlanError: Always.
        """
        del boundaries, without
        raise self._needs_model("hidden states")

    def record(self) -> dict[str, Any]:
        """See :class:`Evidence`."""
        counts = {name: getattr(self.stats, name) for name in ("n_samples", "n_tokens", "n_rows")}
        return {"counts": counts, "options": self.stats.options, "elapsed_s": self.stats.elapsed_s}

    def weights(self, layer: int) -> Mapping[str, Any]:
        """Not known without a model.

        Raises:
            PlanError: Always.
        """
        del layer
        raise self._needs_model("weights")

    def view(self, groups: Sequence[Sequence[int]] = ()) -> FixedEvidence:
        """See :class:`Evidence`."""
        return FixedEvidence(self.stats, self.seed, tuple(tuple(group) for group in groups))

    @staticmethod
    def _needs_model(what: str) -> PlanError:
        return PlanError(
            f"the planner asks for {what}; only statistics taken before were given; plan with the model "
            "(Compressor.plan)"
        )
