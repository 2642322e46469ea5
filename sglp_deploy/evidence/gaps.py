"""What a gap of layers does to the predictions after it is repaired; for planners that choose by that.

Layer by layer, the output map of the MLP before a gap is fitted in closed form to the unpruned stream behind the gap.
One Gram matrix serves every gap that begins behind the same layer.  Only some consecutive hidden states are kept, on
disk, so memory grows neither with tokens nor with layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import nn

from sglp_deploy import _io
from sglp_deploy.errors import CalibrationError, UnsupportedModelError
from sglp_deploy.evidence.branches import Branch, find_branches, flat, inputs_of, watching, with_bias
from sglp_deploy.evidence.least_squares import NormalEquations, best_ridge
from sglp_deploy.evidence.precision import computing
from sglp_deploy.evidence.statistics import GapDamage, gaps_of
from sglp_deploy.evidence.streams import IndexedStream, KeptStream, StackRunner, StreamWindow, held_out_of
from sglp_deploy.models.library import evaluating

if TYPE_CHECKING:
    from sglp_deploy.models import LayerStack
    from sglp_deploy.tasks.base import Task

Progress = Callable[[str, int, int], None]  # stage, done, in all

# Whole plans are judged on so many tokens; single gaps, of which there are many, on one minibatch of these.
JUDGED_TOKENS: Final = 2_048
# A chain of repairs is fitted on so many tokens: enough to rank plans, not to ship one.
CHAIN_TOKENS: Final = 8_192
# A gap that costs more nats than this is in no plan worth shipping; longer ones behind the same layer are not run.
HOPELESS: Final = 1.0
_BROKEN: Final = 100.0
_PIECE: Final = 256  # predictions that are compared at once
_RIDGES: Final = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class _Site:
    """The MLP whose output map is fitted, or None where a layer has no such map: then nothing is repaired."""

    layer: int
    branch: Branch | None

    @property
    def watched(self) -> tuple[str, ...]:
        return () if self.branch is None else (self.branch.path, str(self.branch.projection))


@dataclass(frozen=True)
class _Rows:
    """One minibatch at a site: the map's inputs (T, inputs), and the layer's output without the MLP (T, width)."""

    inputs: torch.Tensor
    rest: torch.Tensor


class GapMeter:
    """Measures gaps of one model on calibration minibatches.

    Every eighth minibatch is fitted on by none; some of these judge.

    Args:
        model: The unpruned model; it is left as it was.
        stack: Its layers.
        task: Says how the model is called, what its loss is, and which positions hold data.
        batches: Calibration minibatches.
        progress: Called with (stage, done, in all).
        precision: What the model's matrices are multiplied in.

    Attributes:
        work: Floating-point operations so far, two for each multiplication with a weight.

    Raises:
        CalibrationError: If there are fewer than two minibatches.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: LayerStack,
        task: Task,
        batches: Sequence[Any],
        progress: Progress | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        if len(batches) < 2:
            raise CalibrationError(
                f"the calibration set gives {len(batches)} minibatch; gaps are fitted on some and judged on others; "
                "give more tokens, or a smaller batch size"
            )
        self._model, self._stack, self._task = model, stack, task
        self._batches = list(batches)
        self._progress = progress
        self._precision = precision
        self._runner = StackRunner(model, stack, task, precision)
        self._held_out = held_out_of(len(batches))
        self._judging = tuple(self._first(self._held_out, JUDGED_TOKENS))
        self._fitted_on = tuple(index for index in range(len(batches)) if index not in self._held_out)
        self._sites: dict[int, _Site] = {}
        self._sizes = [sum(p.numel() for p in layer.parameters()) for layer in stack.layers]
        self._rest = sum(p.numel() for p in model.parameters()) - sum(self._sizes)
        self.work = 0.0

    @property
    def passes(self) -> float:
        """Work so far, in forward passes over all minibatches."""
        tokens = sum(self._n_tokens(index) for index in range(len(self._batches)))
        return self.work / (2.0 * (sum(self._sizes) + self._rest) * tokens)

    def damage(self, longest: int) -> GapDamage:
        """What each gap of up to ``longest`` layers does to the predictions, alone and repaired.

        The first layers have none before them that could be fitted; a gap there is judged as it is.

        Raises:
            StorageError: If hidden states cannot be kept on disk.
            CalibrationError: If the unpruned model's predictions are not finite.
        """
        n_layers = self._stack.n_layers
        values = np.full((n_layers, longest), np.inf)
        judged = np.zeros((n_layers, longest), dtype=bool)
        with _io.scratch("gaps") as folder:
            streams = StreamWindow(folder, self._extend)
            wanted = self._unpruned(self._judging[:1])
            for start in range(n_layers):
                lengths = [n for n in range(1, longest + 1) if start + n <= n_layers]
                targets = [streams.at(start + n) for n in lengths]
                repaired = self._fit(start - 1, streams, targets) if start else None
                row = values[start]
                for column, length in enumerate(lengths):
                    if column and row[column - 1] > HOPELESS:
                        row[column] = row[column - 1] + max(
                            0.0, row[column - 1] - (row[column - 2] if column > 1 else 0)
                        )
                        continue
                    states = {
                        index: streams.at(0).read(index) if repaired is None else repaired(index, column)
                        for index in wanted
                    }
                    row[column] = self._divergence(states, start + length, wanted)
                    judged[start, column] = True
                streams.forget_before(start)
                self._report("gaps", start + 1, n_layers)
        return GapDamage(values, judged, sum(self._n_tokens(index) for index in wanted))

    def chained(self, plans: Sequence[Sequence[int]]) -> list[float]:
        """What each plan does to the predictions, its gaps repaired from shallow to deep on the stream repaired so far.

        Args:
            plans: Layers that are removed, for each plan.

        Returns:
            Mean KL divergence from the unpruned model, nats per prediction, on the rows that judge.
        """
        indices = [*self._first(self._fitted_on, CHAIN_TOKENS), *self._held_out]
        damage = []
        with _io.scratch("gaps") as folder:
            gaps = [gaps_of(plan) for plan in plans]
            ends = sorted({start + length for each in gaps for start, length in each if start})
            behind = self._dense(folder, ends, indices)
            wanted = self._unpruned(self._judging)
            for number, each in enumerate(gaps):
                damage.append(self._chain(folder / "chain.f32", each, behind, indices, wanted))
                self._report("repaired plans", number + 1, len(plans))
        return damage

    # ------------------------------------------------------------------------------------------------ pieces

    def _chain(
        self,
        path: Path,
        gaps: Sequence[tuple[int, int]],
        behind: dict[int, IndexedStream],
        indices: Sequence[int],
        wanted: dict[int, torch.Tensor],
    ) -> float:
        stream = IndexedStream(path.with_suffix(".0"), indices)
        for index in indices:
            stream.append(self._run(index, 0, 0, None))
        at = 0
        for turn, (start, length) in enumerate(gaps):
            if not start:
                at = length  # nothing before it can be fitted
                continue
            following = IndexedStream(path.with_suffix(f".{turn + 1}"), indices)
            # The layer before the gap is fitted, those before it run as they are.
            moved = IndexedStream(path.with_suffix(f".{turn + 1}m"), indices)
            for index in indices:
                moved.append(self._run(index, at, start - 1, stream.read(index)))
            target = [behind[start + length]]
            fitted = [index for index in indices if index not in self._held_out]
            repaired = self._fitted(self._site(start - 1), moved, target, fitted, self._held_out)
            for index in indices:
                following.append(repaired(index, 0))
            for old in (stream, moved):
                old.discard()
            stream, at = following, start + length
        damage = self._divergence({index: stream.read(index) for index in wanted}, at, wanted)
        stream.discard()
        return damage

    def _dense(self, folder: Path, boundaries: Sequence[int], indices: Sequence[int]) -> dict[int, IndexedStream]:
        made = {at: IndexedStream(folder / f"dense-{at}.f32", indices) for at in boundaries}
        if boundaries:
            for index in indices:
                seen = self._runner.watch(self._batches[index], boundaries)
                self.work += 2.0 * sum(self._sizes[: max(boundaries)]) * self._n_tokens(index)
                for at, stream in made.items():
                    stream.append(seen[at])
        return made

    def _fit(
        self, layer: int, streams: StreamWindow, targets: Sequence[KeptStream]
    ) -> Callable[[int, int], torch.Tensor]:
        return self._fitted(self._site(layer), streams.at(layer), targets, self._fitted_on, self._held_out)

    def _fitted(
        self,
        site: _Site,
        given: _Readable,
        targets: Sequence[_Readable],
        fitted_on: Sequence[int],
        held_out: Sequence[int],
    ) -> Callable[[int, int], torch.Tensor]:
        """Fit the site's map to each target; returns what gives a minibatch's states behind the gap to a target."""
        if site.branch is None:
            return lambda index, _: self._run(index, site.layer, site.layer + 1, given.read(index))
        branch = site.branch
        projection = self._stack.layers[site.layer].get_submodule(str(branch.projection))
        old = with_bias(projection)
        if branch.norm is not None:
            old = torch.zeros_like(old)  # a norm follows: the map alone says nothing of the size that is added
        towards = old.repeat(1, len(targets))
        sums = []
        for indices in (fitted_on, held_out):
            equations = NormalEquations(towards.shape[0], towards.shape[1], towards.device)
            for index in indices:
                rows = self._rows(site, index, given.read(index))
                valid = self._valid(index, rows.inputs.device)
                rest = rows.rest[valid]
                behind = [flat(target.read(index)).to(rest.device)[valid] for target in targets]
                wanted = torch.cat([(each - rest) / branch.scale for each in behind], 1)
                size = behind[0].double().pow(2).mean(-1).clamp(min=1e-12)
                equations.add(rows.inputs[valid], wanted, 1 / size)
                self.work += 2.0 * valid.sum().item() * towards.shape[0] * sum(towards.shape)
            sums.append(equations)
        # One ridge for all lengths, chosen for the middle one: solving is dear, and they differ little.
        width = old.shape[1]
        middle = len(targets) // 2
        part = [each.of_outputs(middle * width, (middle + 1) * width) for each in sums]
        _, ridge, _ = best_ridge(part[0], part[1], old, _RIDGES)
        weights = sums[0].solve(towards, ridge).float()

        def states(index: int, target: int) -> torch.Tensor:
            hidden = given.read(index)
            rows = self._rows(site, index, hidden)
            own = weights[:, target * width : (target + 1) * width]
            return (rows.rest + branch.scale * (rows.inputs @ own)).reshape(hidden.shape)

        return states

    def _rows(self, site: _Site, index: int, given: torch.Tensor) -> _Rows:
        assert site.branch is not None
        layer = self._stack.layers[site.layer]
        projection = layer.get_submodule(str(site.branch.projection))
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with watching(layer, site.watched, seen):
            out = self._run(index, site.layer, site.layer + 1, given)
        inputs = inputs_of(projection, seen[str(site.branch.projection)][0])
        rest = flat(out).float() - site.branch.scale * flat(seen[site.branch.path][1]).float()
        return _Rows(inputs, rest)

    def _site(self, layer: int) -> _Site:
        if layer not in self._sites:
            self._sites[layer] = _Site(layer, self._branch(layer))
        return self._sites[layer]

    def _branch(self, layer: int) -> Branch | None:
        # One minibatch, for whoever asks first.  It is not in ``work``: a plan's record would depend on earlier plans.
        finely = StackRunner(self._model, self._stack, self._task)

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode():
                given = finely.run(self._batches[0], 0, layer).clone()
                return given, finely.run(self._batches[0], layer, layer + 1, given)

        try:
            found = find_branches(self._stack.layers[layer], once)[1]
        except UnsupportedModelError:
            return None  # no repair can be folded in there either
        return None if found.projection is None else found

    def _unpruned(self, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """Log-probabilities of the unpruned model on some minibatches."""
        found = {}
        for index in indices:
            place = next(self._model.parameters()).device
            with evaluating(self._model), torch.inference_mode(), computing(place, self._precision):
                logits = self._task.logits(self._model, self._batches[index])
                if not bool(logits.isfinite().all()):
                    raise CalibrationError(
                        "the predictions on the calibration text are not finite; the weights hold NaN or Inf, or "
                        "activations overflow; check the checkpoint, or run in float32"
                    )
                # In half the room: where it is coarse, the probability is next to nothing.
                found[index] = logits.log_softmax(-1).half()
            self.work += 2.0 * (sum(self._sizes) + self._rest) * self._n_tokens(index)
        return found

    def _divergence(self, states: dict[int, torch.Tensor], boundary: int, wanted: dict[int, torch.Tensor]) -> float:
        nats, count = 0.0, 0
        for index, hidden in states.items():
            with torch.inference_mode():
                logits = self._runner.logits_from(self._batches[index], boundary, hidden)
                for start in range(0, len(logits), _PIECE):
                    said = logits[start : start + _PIECE].log_softmax(-1)
                    meant = wanted[index][start : start + _PIECE].float()
                    nats += float((meant.exp() * (meant - said)).sum(dtype=torch.float64))
            count += len(logits)
            self.work += 2.0 * (sum(self._sizes[boundary:]) + self._rest) * self._n_tokens(index)
        mean = nats / max(1, count)
        # A broken model's predictions may be no numbers; that is worse than any that are.
        return mean if np.isfinite(mean) else _BROKEN

    def _run(self, index: int, start: int, stop: int, hidden: torch.Tensor | None) -> torch.Tensor:
        self.work += 2.0 * sum(self._sizes[start:stop]) * self._n_tokens(index)
        if hidden is not None and start == stop:
            return hidden
        with torch.inference_mode():
            return self._runner.run(self._batches[index], start, stop, hidden).clone()

    def _extend(self, before: KeptStream | None, boundary: int, made: KeptStream) -> None:
        for index in range(len(self._batches)):
            start = boundary if before is None else boundary - 1
            made.append(self._run(index, start, boundary, None if before is None else before.read(index)))

    def _valid(self, index: int, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(self._task.valid(self._batches[index])).flatten().to(device)

    def _n_tokens(self, index: int) -> int:
        return int(self._task.valid(self._batches[index]).sum())

    def _first(self, indices: Sequence[int], tokens: int) -> Iterator[int]:
        """As many of these minibatches, from the front, as hold so many tokens; at least one."""
        left = tokens
        for index in indices:
            if left <= 0:
                return
            yield index
            left -= self._n_tokens(index)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)


_Readable = KeptStream | IndexedStream
