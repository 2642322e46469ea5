"""A pruned model under repair: its gaps, the unpruned model's hidden states behind them, its own as repaired so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.branches import Branch, find_branches
from sglp_deploy.evidence.precision import computing
from sglp_deploy.evidence.streams import KeptStream, StackRunner, held_out_of
from sglp_deploy.models.library import evaluating

if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.models import LayerStack
    from sglp_deploy.tasks.base import Task

Progress = Callable[[str, int, int], None]  # stage, done, in all


@dataclass(frozen=True)
class Gap:
    """Removed layers in a row.

    Attributes:
        before: The kept layer before them, by its number in the pruned model.
        behind: The boundary behind them in the unpruned model: the number of the layer that follows, or L.
    """

    before: int
    behind: int


class Workbench:
    """What a repair works on.

    Args:
        dense: The unpruned model, which is left as it was.
        stack: Its layers.
        pruned: Made of it by the plan; the repair changes its parameters, which are then its own.
        task: Says how the model is called, what its loss is, and which positions hold data.
        batches: Calibration minibatches.
        folder: For hidden states; empty.
        progress: Called with (stage, done, in all).
        precision: What matrices are multiplied in.

    Raises:
        CalibrationError: If there are fewer than two minibatches, so that none could be held out.
    """

    def __init__(
        self,
        dense: nn.Module,
        stack: LayerStack,
        pruned: CompressedModel,
        task: Task,
        batches: Sequence[Any],
        folder: Path,
        progress: Progress | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        if len(batches) < 2:
            raise CalibrationError(
                f"the calibration set gives {len(batches)} minibatch; a repair is fitted on some and judged on others; "
                "give more tokens, or a smaller batch size"
            )
        self.pruned = pruned
        self.task = task
        self.batches = list(batches)
        self.held_out = held_out_of(len(batches))
        self._stack = stack
        self._dense = StackRunner(dense, stack, task, precision)
        self._own = StackRunner(pruned.module, pruned.stack, task, precision)
        # Sums are told from rounding only where both are fine.
        self._finely = StackRunner(pruned.module, pruned.stack, task)
        self._precision = precision
        self._folder = folder
        self._progress = progress
        self._behind: dict[int, KeptStream] = {}
        self._changed: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._files = 0

    @property
    def kept(self) -> tuple[int, ...]:
        """Old number of each layer of the pruned model."""
        return self.pruned.plan.keep

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Where layers are missing behind a kept one, shallow to deep; those in front of all have none to be fitted."""
        ends = (*self.kept[1:], self._stack.n_layers)
        return tuple(
            Gap(new, behind) for new, (old, behind) in enumerate(zip(self.kept, ends, strict=True)) if behind != old + 1
        )

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The pruned model's layers."""
        return self.pruned.stack.layers

    @property
    def changed(self) -> dict[str, torch.Tensor]:
        """What was put in and is not what was there before, under its name in the unpruned model, as it is now."""
        return {
            name: parameter.detach()
            for name, parameter in self._changed.items()
            if not torch.equal(parameter.detach(), self._before[name])
        }

    def valid(self, index: int) -> torch.Tensor:
        """Which positions of a minibatch hold data."""
        return torch.from_numpy(self.task.valid(self.batches[index]))

    def fitted_on(self) -> Iterator[int]:
        """Minibatches that weights may be fitted on."""
        return (index for index in range(len(self.batches)) if index not in self.held_out)

    def dense(self, boundaries: Sequence[int]) -> dict[int, KeptStream]:
        """The unpruned model's hidden states at boundaries, on every minibatch; one pass for all that are new."""
        new = sorted(set(boundaries) - set(self._behind))
        if new:
            made = {at: self._stream() for at in new}
            for index, batch in enumerate(self.batches):
                for at, hidden in self._dense.watch(batch, new).items():
                    if at in made:
                        made[at].append(hidden)
                self.report("unpruned hidden states", index + 1, len(self.batches))
            self._behind |= made
        return {at: self._behind[at] for at in boundaries}

    def drifted(self, before: KeptStream | None, start: int, stop: int) -> KeptStream:
        """The pruned model's hidden states at its boundary ``stop``, as it is repaired so far.

        Args:
            before: Its states at boundary ``start``, which are given up for the new ones; it is run from the beginning
                when omitted.
            start: First layer to run, in new numbers.
            stop: One beyond the last.
        """
        if before is not None and start == stop:
            return before
        made = self._stream()
        for index, batch in enumerate(self.batches):
            with torch.inference_mode():
                made.append(self._own.run(batch, start, stop, None if before is None else before.read(index)))
        if before is not None:
            before.discard()  # or the disk would hold one stream more for every gap
        return made

    def run(self, index: int, start: int, stop: int, hidden: torch.Tensor) -> torch.Tensor:
        """One minibatch through layers of the pruned model; with gradients where they are enabled."""
        return self._own.run(self.batches[index], start, stop, hidden)

    def states(self, index: int, boundary: int) -> torch.Tensor:
        """One minibatch's hidden states at a boundary of the pruned model."""
        with torch.inference_mode():
            return self._own.run(self.batches[index], 0, boundary).clone()

    @property
    def layer_containers(self) -> tuple[str, ...]:
        """What the names of modules inside the layers begin with, and nothing else's."""
        return tuple(f"{name}." for name in self.pruned.stack.containers)

    def branches(self, layer: int) -> tuple[Branch, Branch]:
        """The branches of a layer of the pruned model, found on one minibatch; see :func:`find_branches`."""

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode():
                given = self._finely.run(self.batches[0], 0, layer).clone()
                return given, self._finely.run(self.batches[0], layer, layer + 1, given)

        return find_branches(self.layers[layer], once)

    def given(self, index: int, stream: KeptStream) -> torch.Tensor:
        """One minibatch of a stream, where the model is and in its element type."""
        parameter = next(self.pruned.module.parameters())
        return stream.read(index).to(parameter.device, parameter.dtype)

    def put(self, layer: int, path: str, value: torch.Tensor) -> None:
        """Give a parameter of one of the pruned model's layers a new value; the unpruned model keeps its own.

        Args:
            layer: New number.
            path: Of the parameter, inside the layer ("mlp.down_proj.weight").
            value: Same shape; stored in the parameter's own type.

        Raises:
            CalibrationError: If it holds NaN or infinity.
        """
        self._put(f"{self.pruned.stack.names[layer]}.{path}", f"{self._stack.names[self.kept[layer]]}.{path}", value)

    def put_outside(self, path: str, value: torch.Tensor) -> None:
        """The same for a parameter outside the layers, under all its names where it is tied."""
        self._put(path, path, value)

    def _put(self, name: str, old_name: str, value: torch.Tensor) -> None:
        module = self.pruned.module
        old = module.get_parameter(name)
        new = value.detach().to(old.device, old.dtype).contiguous().clone()
        if not bool(new.isfinite().all()):
            raise CalibrationError(
                f"the repair gives {old_name} NaN or infinity; the calibration rows cannot support it; give more tokens"
            )
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        for place in [each for each, one in module.named_parameters(remove_duplicate=False) if one is old]:
            owner, _, leaf = place.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)
        self._changed[old_name] = parameter
        self._before.setdefault(old_name, old.detach())

    def distance(self, stream: KeptStream, start: int, stop: int, target: KeptStream) -> float:
        """Mean over held-out positions of the relative squared distance to ``target`` after layers start to stop."""
        total, count = 0.0, 0
        for index in self.held_out:
            with torch.inference_mode():
                got = self.run(index, start, stop, self.given(index, stream)).float().cpu()
            valid, wanted = self.valid(index), target.read(index)
            gap = (got - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp(min=1e-12)
            total += float(gap[valid].double().sum())
            count += int(valid.sum())
        return total / max(1, count)

    def loss(self, module: nn.Module) -> float:
        """Mean loss of ``module`` on the held-out minibatches, per prediction; infinity where it is not finite."""
        total, count = 0.0, 0
        for index in self.held_out:
            place = next(module.parameters()).device
            with evaluating(module), torch.inference_mode(), computing(place, self._precision):
                mean, predictions = self.task.loss(module, self.batches[index])
            total += float(mean) * predictions
            count += predictions
        mean_loss = total / max(1, count)
        return mean_loss if math.isfinite(mean_loss) else math.inf

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the user how far it is."""
        if self._progress is not None:
            self._progress(stage, done, total)

    def _stream(self) -> KeptStream:
        self._files += 1
        return KeptStream(self._folder / f"{self._files}.f32")
