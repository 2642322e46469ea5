"""``local``: the kept layers up to each gap trained, a few at a time, on the unpruned model's hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from sglp_deploy.evidence.streams import KeptStream
from sglp_deploy.repairs.options import LocalOptions, RefitOptions
from sglp_deploy.repairs.refit import Refit
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Workbench


class Local:
    """Trains windows of layers, from shallow to deep, to meet the unpruned model's stream.

    A window ends with the layer before a gap and is trained towards the stream behind the gap.  Windows behind the
    last gap are trained towards their own unpruned output, so that they take back what has drifted.  The error of each
    token is relative to its size.  It starts from ``refit``.  Every weight of a layer may change, and none outside the
    layers.  A window that does not bring the held-out stream closer gets its weights back.

    No loss of the whole model and no label is used: memory is that of one window.

    Source: ours; compare LLM-Streamline, arXiv:2403.19135, which trains new layers in place of a contiguous block.
    """

    name = "local"
    source = "this project (docs/method.md); compare LLM-Streamline, arXiv:2403.19135"
    Options = LocalOptions

    def fit(self, bench: Workbench, options: LocalOptions) -> Fitted:
        """See :class:`sglp_deploy.repairs.seam.Repair`."""
        windows = list(_windows(bench, options.window, later=options.later))
        behind = bench.dense(sorted({boundary for _, _, boundary in windows}))
        refitted = Refit().fit(bench, RefitOptions(precision=options.precision))
        trained: list[dict[str, Any]] = []
        not_done = list(refitted.not_done)
        stream, at = None, 0
        for done, (start, stop, boundary) in enumerate(windows):
            stream, at = bench.drifted(stream, at, start), start
            layers = [bench.kept[layer] for layer in range(start, stop)]
            before, after = _train(bench, start, stop, stream, behind[boundary], options)
            if after < before:
                facts = {"layers": layers, "behind": boundary, "distance_before": before, "distance_after": after}
                trained.append(facts)
            else:
                not_done.append(f"layers {layers}: training them brings the held-out stream no closer; taken back")
            bench.report("local", done + 1, len(windows))
        return Fitted({**refitted.facts, "trained": trained}, tuple(not_done))


def _windows(bench: Workbench, size: int, *, later: bool) -> Iterator[tuple[int, int, int]]:
    """First layer, one beyond the last (new numbers), and the boundary the window is trained to."""
    end = 0
    for gap in bench.gaps:
        yield max(end, gap.before + 1 - size), gap.before + 1, gap.behind
        end = gap.before + 1
    if later and bench.gaps:
        for start in range(end, len(bench.kept), size):
            stop = min(start + size, len(bench.kept))
            yield start, stop, bench.kept[stop - 1] + 1


def _train(
    bench: Workbench, start: int, stop: int, stream: KeptStream, target: KeptStream, options: LocalOptions
) -> tuple[float, float]:
    """Train layers in place; the held-out distance before and after, equal where nothing was gained."""
    before = bench.distance(stream, start, stop, target)
    old = {
        (layer, path): parameter.detach()
        for layer in range(start, stop)
        for path, parameter in bench.layers[layer].named_parameters()
    }
    for (layer, path), value in old.items():
        bench.put(layer, path, value)  # parameters of the pruned model's own
    own = {(layer, path): bench.layers[layer].get_parameter(path) for layer, path in old}
    wanted_grad = {key: parameter.requires_grad for key, parameter in own.items()}
    rate = options.learning_rate or 0.035 / math.sqrt(target.read(0).shape[-1])
    optimizer = torch.optim.Adam(own.values(), lr=rate, betas=(0.9, 0.99))
    indices = list(bench.fitted_on())
    steps = options.epochs * len(indices)
    generator = torch.Generator().manual_seed(options.seed)
    for parameter in own.values():
        parameter.requires_grad_(True)
    step = 0
    for _ in range(options.epochs):
        for place in torch.randperm(len(indices), generator=generator).tolist():
            # Warm-up over a twentieth of the steps, then a cosine to zero.
            warm = min(1.0, (step + 1) / max(1.0, 0.05 * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.enable_grad():
                error = _error(bench, indices[place], start, stop, stream, target)
                optimizer.zero_grad(set_to_none=True)
                error.backward()  # type: ignore[no-untyped-call]  # torch types backward only partly
            optimizer.step()
            step += 1
    for key, parameter in own.items():
        parameter.grad = None
        parameter.requires_grad_(wanted_grad[key])
    after = bench.distance(stream, start, stop, target)
    if not after < before:
        for (layer, path), value in old.items():
            bench.put(layer, path, value)
        return before, before
    return before, after


def _error(bench: Workbench, index: int, start: int, stop: int, stream: KeptStream, target: KeptStream) -> torch.Tensor:
    got = bench.run(index, start, stop, bench.given(index, stream)).float()
    valid, wanted = bench.valid(index).to(got.device), target.read(index).to(got.device)
    relative = (got - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1).clamp(min=1e-12)
    return relative[valid].mean()
