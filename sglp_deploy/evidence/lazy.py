"""What a planner may look at, taken from the model when it is asked for and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.errors import CalibrationError, PlanError
from sglp_deploy.evidence.collect import collect_layer_stats
from sglp_deploy.evidence.gaps import GapMeter
from sglp_deploy.evidence.precision import precision_of
from sglp_deploy.evidence.probes import PROBES, make_probes
from sglp_deploy.evidence.probes.base import hidden_into, hidden_of
from sglp_deploy.evidence.statistics import GapDamage, LayerStats
from sglp_deploy.models import LayerStack
from sglp_deploy.models.library import evaluating
from sglp_deploy.models.proof import passed_over

if TYPE_CHECKING:
    from sglp_deploy.evidence.text import TokenBatches
    from sglp_deploy.tasks.base import Task

Progress = Callable[[str, int, int], None]  # stage, done, in all


@dataclass
class _Taken:
    """What has been measured so far, shared by every view of one evidence."""

    stats: dict[tuple[str, ...], LayerStats] = field(default_factory=dict)
    losses: dict[tuple[int, ...], float] = field(default_factory=dict)
    meters: dict[torch.dtype, GapMeter] = field(default_factory=dict)
    # With what each took, in forward passes.
    gaps: dict[tuple[torch.dtype, int], tuple[GapDamage, float]] = field(default_factory=dict)
    repaired: dict[tuple[torch.dtype, tuple[int, ...]], tuple[float, float]] = field(default_factory=dict)


class ModelEvidence:
    """See :class:`sglp_deploy.planners.seam.Evidence`; nothing runs before it is asked for.

    Args:
        model: The unpruned model; it is left as it was.
        stack: The layers that are chosen from.
        task: Says what the loss is.
        batches: The calibration rows, made when they are first needed.
        rows: "rms" or "raw"; see :func:`sglp_deploy.evidence.collect.collect_layer_stats`.
        skip_positions: Leading positions left out of the similarity.
        seed: Which rows are drawn; also for planners that draw.
        progress: Called with (stage, done, in all) during long work.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: LayerStack,
        task: Task,
        batches: Callable[[], TokenBatches],
        *,
        rows: str = "rms",
        skip_positions: int = 1,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._stack = stack
        self._task = task
        self._make_batches = batches
        self._settings: dict[str, Any] = {"rows": rows, "skip_positions": skip_positions, "seed": seed}
        self._progress = progress
        self._taken = _Taken()
        self._used: list[LayerStats] = []
        self._ran = False  # whether the model ran for this view in another way than a pass with probes
        # Work of the repaired gaps and plans that this view has asked for.
        self._passes: dict[tuple[torch.dtype, Any], float] = {}
        self.seed = seed
        self.groups: tuple[tuple[int, ...], ...] = ()

    @property
    def n_layers(self) -> int:
        """L."""
        return self._stack.n_layers

    @property
    def prunable(self) -> tuple[bool, ...]:
        """Whether each layer may be removed (L)."""
        return self._stack.prunable

    @property
    def parameters(self) -> NDArray[np.int64]:
        """Parameters in each layer (L)."""
        return np.array([sum(p.numel() for p in layer.parameters()) for layer in self._stack.layers], dtype=np.int64)

    @property
    def other_parameters(self) -> int:
        """Parameters outside the layers, tied ones counted once."""
        return sum(p.numel() for p in self._model.parameters()) - int(self.parameters.sum())

    @property
    def stats(self) -> LayerStats:
        """What every probe says, from one pass over the calibration rows."""
        return self.measured(*PROBES)

    def measured(self, *probes: str) -> LayerStats:
        """What these probes say, from one pass; a pass that held them all already is not repeated.

        Raises:
            ConfigError: If a probe is unknown.
            CalibrationError: If the calibration rows cannot support it.
        """
        names = tuple(probe.name for probe in make_probes(probes))
        stats = next((stats for taken, stats in self._taken.stats.items() if set(names) <= set(taken)), None)
        stats = stats or self._pass(names)
        if not any(each is stats for each in self._used):
            self._used.append(stats)
        return stats

    def _pass(self, names: tuple[str, ...]) -> LayerStats:
        stats = collect_layer_stats(
            self._model,
            self._make_batches(),
            task=self._task,
            probes=names,
            progress=self._stage("calibrate"),
            **self._settings,
        )
        self._taken.stats[names] = stats
        return stats

    def loss_without(self, layers: Sequence[int] = ()) -> float:
        """Mean loss on the calibration rows with ``layers`` passed over, nats per prediction; taken once for each set.

        Raises:
            PlanError: If there is no such layer.
            CalibrationError: If it is not finite.
        """
        gone = tuple(sorted(set(layers)))
        self._check(gone, self.n_layers - 1)
        self._ran = True
        if gone not in self._taken.losses:
            self._taken.losses[gone] = self._loss(gone)
        return self._taken.losses[gone]

    def gap_damage(self, longest: int, *, precision: str = "auto") -> GapDamage:
        """What every gap of up to ``longest`` layers does to the predictions after the layer before it is fitted.

        Args:
            longest: Layers in one gap, at most.
            precision: What the model's matrices are multiplied in: "fp32", "bf16", or "auto" (bf16 where the processor
                multiplies it).

        Raises:
            CalibrationError: If the calibration rows cannot support it.
            StorageError: If hidden states cannot be kept on disk.
        """
        dtype = precision_of(precision, self._model)
        if (dtype, longest) not in self._taken.gaps:
            meter = self._meter(dtype)
            before = meter.passes
            self._taken.gaps[dtype, longest] = (meter.damage(longest), meter.passes - before)
        found, self._passes[dtype, longest] = self._taken.gaps[dtype, longest]
        return found

    def damage_repaired(self, plans: Sequence[Sequence[int]], *, precision: str = "auto") -> list[float]:
        """What each plan does to the predictions with the layer before each gap fitted, on rows nothing was fitted on.

        Args:
            plans: Layers that are removed, for each plan.
            precision: As for :meth:`gap_damage`.

        Raises:
            PlanError: If there is no such layer.
            CalibrationError: If the calibration rows cannot support it.
            StorageError: If hidden states cannot be kept on disk.
        """
        dtype = precision_of(precision, self._model)
        wanted = [(dtype, tuple(sorted(set(plan)))) for plan in plans]
        for _, plan in wanted:
            self._check(plan, self.n_layers - 1)
        new = [key for key in dict.fromkeys(wanted) if key not in self._taken.repaired]
        if new:
            meter = self._meter(dtype)
            before = meter.passes
            losses = meter.chained([plan for _, plan in new])
            share = (meter.passes - before) / len(new)
            self._taken.repaired |= {key: (loss, share) for key, loss in zip(new, losses, strict=True)}
        self._passes |= {key: self._taken.repaired[key][1] for key in wanted}
        return [self._taken.repaired[key][0] for key in wanted]

    def hidden(
        self, boundaries: Sequence[int], *, without: Sequence[int] = ()
    ) -> Iterator[dict[int, NDArray[np.float32]]]:
        """The residual stream at some boundaries, minibatch by minibatch; padding is left out.

        Args:
            boundaries: 0 to L; boundary ``l`` is what layer ``l`` is given, L is what the last layer gives.
            without: Layers that are passed over.

        Yields:
            Boundary to its rows, shape (tokens of the minibatch, width), float32.

        Raises:
            PlanError: If there is no such boundary or layer.
        """
        self._check(boundaries, self.n_layers)
        self._check(without, self.n_layers - 1)
        self._ran = True
        kept = [layer for layer in range(self.n_layers) if layer not in set(without)]
        for batch in self._batches():
            valid = torch.from_numpy(self._task.valid(batch))
            seen: dict[int, torch.Tensor] = {}
            # After the hooks that pass layers over, so that what is seen is what is handed on.
            with self._passing(kept), _watching(self._stack, boundaries, seen), torch.inference_mode():
                self._task.loss(self._model, batch)
            yield {at: seen[at].float().cpu()[valid].numpy() for at in boundaries}

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer under their names in the unpruned model; not to be changed.

        Raises:
            PlanError: If there is no such layer.
        """
        self._check([layer], self.n_layers - 1)
        name = self._stack.names[layer]
        own = self._stack.layers[layer].named_parameters(remove_duplicate=False)
        return {f"{name}.{leaf}": parameter.detach() for leaf, parameter in own}

    def record(self) -> dict[str, Any]:
        """What this view has looked at: ``counts``, ``options`` and ``elapsed_s`` of its passes.

        ``forward_passes`` is the work of repaired gaps and plans, in forward passes over the calibration rows.
        """
        repaired = {"forward_passes": round(sum(self._passes.values()), 1)} if self._passes else {}
        if self._used:
            last = self._used[-1]
            n_rows = max(each.n_rows for each in self._used)
            counts = {"n_samples": last.n_samples, "n_tokens": last.n_tokens, "n_rows": n_rows, **repaired}
            return {"counts": counts, "options": last.options, "elapsed_s": sum(each.elapsed_s for each in self._used)}
        if not self._ran and not repaired:
            return {"counts": {}, "options": {}, "elapsed_s": 0.0}
        batches = self._make_batches()
        counts = {"n_samples": batches.n_samples, "n_tokens": batches.n_tokens, "n_rows": 0, **repaired}
        types = sorted({str(dtype).removeprefix("torch.") for dtype, _ in self._passes})
        return {"counts": counts, "options": {"precision": types} if types else {}, "elapsed_s": 0.0}

    def view(self, groups: Sequence[Sequence[int]] = ()) -> ModelEvidence:
        """The same evidence for one decision: what was measured is shared, the record begins anew."""
        view = copy.copy(self)
        view.groups = tuple(tuple(group) for group in groups)
        view._used, view._ran, view._passes = [], False, {}
        return view

    def _check(self, numbers: Sequence[int], last: int) -> None:
        """Refuse numbers outside 0 to ``last``: an answer about a layer that is not there would mislead a method."""
        wrong = [number for number in numbers if not 0 <= number <= last]
        if wrong:
            raise PlanError(
                f"the planner asks about {wrong[0]} and the model counts from 0 to {last}; the planner is at fault; "
                "report it to its author"
            )

    @contextmanager
    def _passing(self, kept: Sequence[int]) -> Iterator[None]:
        with evaluating(self._model), passed_over(self._stack, kept):
            yield

    def _batches(self) -> TokenBatches:
        batches = self._make_batches()
        self._task.check(self._model, batches)
        return batches

    def _loss(self, gone: tuple[int, ...]) -> float:
        kept = [layer for layer in range(self.n_layers) if layer not in gone]
        batches = self._batches()
        report = self._stage(f"loss without {', '.join(map(str, gone)) or 'none'}")
        nats, predictions = 0.0, 0
        for done, batch in enumerate(batches):
            with self._passing(kept), torch.inference_mode():
                loss, count = self._task.loss(self._model, batch)
            nats += float(loss) * count
            predictions += count
            if report is not None:
                report(done + 1, len(batches))
        mean = nats / max(1, predictions)
        if not np.isfinite(mean):
            raise CalibrationError(
                f"the loss without layers {list(gone)} is {mean}; the weights hold NaN or Inf, or activations "
                "overflow; check the checkpoint, or run in float32"
            )
        return mean

    def _meter(self, precision: torch.dtype) -> GapMeter:
        if precision not in self._taken.meters:
            batches = list(self._batches())
            made = GapMeter(self._model, self._stack, self._task, batches, self._progress, precision)
            self._taken.meters[precision] = made
        return self._taken.meters[precision]

    def _stage(self, name: str) -> Callable[[int, int], None] | None:
        report = self._progress
        return None if report is None else lambda done, total: report(name, done, total)


@contextmanager
def _watching(stack: LayerStack, boundaries: Sequence[int], seen: dict[int, torch.Tensor]) -> Iterator[None]:
    """Keep the hidden state at ``boundaries`` in ``seen`` while one minibatch runs."""

    def before(at: int) -> Callable[..., None]:
        def hook(_layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            seen[at] = hidden_into(arguments, keywords).detach()

        return hook

    def after(_layer: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        seen[stack.n_layers] = hidden_of(output).detach()

    with ExitStack() as cleanup:
        for index, layer in enumerate(stack.layers):
            if index in boundaries:
                cleanup.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
        if stack.n_layers in boundaries:
            cleanup.callback(stack.layers[-1].register_forward_hook(after).remove)
        yield
