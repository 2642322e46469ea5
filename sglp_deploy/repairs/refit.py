"""``refit``: the output projections before each gap fitted, so that the stream is right again behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.evidence.branches import Branch, as_stored, flat, inputs_of, watching, with_bias
from sglp_deploy.evidence.least_squares import NormalEquations, best_ridge
from sglp_deploy.evidence.streams import KeptStream
from sglp_deploy.repairs.options import RefitOptions
from sglp_deploy.repairs.seam import Fitted
from sglp_deploy.repairs.workbench import Workbench

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Refit:
    """Fits whole output projections of the layer before each gap, from shallow to deep.

    With ``a`` the inputs of the projection, ``r`` the pruned model's stream without it and ``h`` the unpruned model's
    stream behind the gap, both on the same tokens, the new weight W solves

        min  sum over tokens of  |W a - (h - r)|^2 / |h|^2  +  ridge * mean(a^2) * |W - W_old|^2

    Each token's error counts relative to its size, because a few tokens have activations a hundred times the others
    (massive activations).  They stay in the fit.  Attention's projection is solved jointly with the MLP's.  Only its
    part is kept, and the MLP's is solved again on the activations that then come out.  ``r`` is always that of the
    model as it is repaired so far.

    A projection whose output passes a norm before it is added (Gemma-2 and later, OLMo-2) is fitted by direction, at
    the size it had, and the norm's weight by least squares for each channel.  A change that does not bring the
    held-out stream closer is taken back.

    Source: ours; the nearest published are ReplaceMe (arXiv:2505.02819: an h x h map of the MLP's output, towards the
    stream behind a contiguous block) and GRAIL (arXiv:2602.23795: whole projections, for width, towards the layer's own
    output).
    """

    name = "refit"
    source = "this project (docs/method.md); compare ReplaceMe, arXiv:2505.02819"
    Options = RefitOptions

    def fit(self, bench: Workbench, options: RefitOptions) -> Fitted:
        """See :class:`sglp_deploy.repairs.seam.Repair`."""
        targets = _targets(bench, later=options.later)
        behind = bench.dense(sorted({boundary for _, boundary, _ in targets}))
        stream: KeptStream | None = None
        at = 0
        fits: list[dict[str, Any]] = []
        not_done: list[str] = []
        for done, (layer, boundary, both) in enumerate(targets):
            stream, at = bench.drifted(stream, at, layer), layer
            old = bench.kept[layer]
            try:
                attention, mlp = bench.branches(layer)
            except UnsupportedModelError as error:
                not_done.append(f"layer {old}: {error}")
                continue
            site = Site(bench, layer, stream, behind[boundary])
            steps = ((attention, mlp), (mlp, attention)) if both and options.attention else ((mlp, attention),)
            for branch, other in steps:
                made = _fit_branch(site, branch, other, options.ridge, joint=branch is attention)
                if isinstance(made, str):
                    not_done.append(f"layer {old}, {branch.path}: {made}")
                else:
                    fits.append({"layer": old, "behind": boundary, **made})
            bench.report("refit", done + 1, len(targets))
        return Fitted({"fits": fits}, tuple(not_done))


def _targets(bench: Workbench, *, later: bool) -> list[tuple[int, int, bool]]:
    """Layers to fit by new number, the boundary each is fitted to, and whether it stands before a gap."""
    gaps = {gap.before: gap.behind for gap in bench.gaps}
    if not gaps:
        return []
    first = min(gaps)
    return [
        (new, gaps.get(new, old + 1), new in gaps)
        for new, old in enumerate(bench.kept)
        if new in gaps or (later and new > first)
    ]


@dataclass(frozen=True)
class Site:
    """One layer of the pruned model, what it is given, and what should come out."""

    bench: Workbench
    layer: int
    stream: KeptStream
    target: KeptStream

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.bench.layers[self.layer]

    def distance(self) -> float:
        """See :meth:`Workbench.distance`."""
        return self.bench.distance(self.stream, self.layer, self.layer + 1, self.target)

    def rows(self, indices: Sequence[int], paths: Sequence[str]) -> Iterator[Rows]:
        """What passed through modules of the layer, minibatch by minibatch, positions with data only."""
        for index in indices:
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            given = self.bench.given(index, self.stream)
            with watching(self.module, paths, seen), torch.inference_mode():
                self.bench.run(index, self.layer, self.layer + 1, given)
            valid = self.bench.valid(index).flatten().to(given.device)
            width = given.shape[-1]
            yield Rows(
                {path: flat(pair[0])[valid] for path, pair in seen.items()},
                {path: flat(pair[1])[valid] for path, pair in seen.items()},
                given.reshape(-1, width)[valid].float(),
                self.target.read(index).reshape(-1, width).to(given.device)[valid],
            )


@dataclass(frozen=True)
class Rows:
    """Rows of one minibatch: inputs and outputs of modules, the layer's input, and the stream behind the gap."""

    into: dict[str, torch.Tensor]
    out: dict[str, torch.Tensor]
    given: torch.Tensor
    target: torch.Tensor

    @property
    def relative(self) -> torch.Tensor:
        """What each row's squared error counts."""
        return 1 / self.target.double().pow(2).mean(-1).clamp(min=1e-12)


def _fit_branch(site: Site, branch: Branch, other: Branch, ridge: float | None, *, joint: bool) -> dict[str, Any] | str:
    """Fit one branch; what was done, or why nothing was."""
    if branch.projection is None:
        return "no single linear map makes it (a mixture of experts); it stays as it is"
    before = site.distance()
    projection = site.module.get_submodule(branch.projection)
    kept = {name: value.detach() for name, value in projection.named_parameters(recurse=False)}
    if branch.norm is not None:
        norm = site.module.get_submodule(branch.norm)
        kept_norm = norm.get_parameter("weight").detach()
        reason = _fit_normed(site, branch, other, ridge)
    else:
        reason = _fit_plain(site, branch, other, ridge, joint=joint and other.projection is not None and not other.norm)
    if reason:
        return reason
    after = site.distance()
    if not after < before:
        for name, value in kept.items():
            site.bench.put(site.layer, f"{branch.projection}.{name}", value)
        if branch.norm is not None:
            site.bench.put(site.layer, f"{branch.norm}.weight", kept_norm)
        return f"the fit does not bring the held-out stream closer ({before:.3g} to {after:.3g}); taken back"
    return {"projection": branch.projection, "distance_before": before, "distance_after": after}


def _design(site: Site, rows: Rows, paths: Sequence[str]) -> torch.Tensor:
    """Inputs of projections side by side."""
    return torch.cat([inputs_of(site.module.get_submodule(path), rows.into[path]) for path in paths], 1)


def _weights(site: Site, path: str) -> torch.Tensor:
    return with_bias(site.module.get_submodule(path))


def _put(site: Site, path: str, weights: torch.Tensor) -> None:
    projection = site.module.get_submodule(path)
    if projection._parameters.get("bias") is not None:
        site.bench.put(site.layer, f"{path}.bias", weights[-1])
        weights = weights[:-1]
    site.bench.put(site.layer, f"{path}.weight", as_stored(projection, weights.T))


def _fit_plain(site: Site, branch: Branch, other: Branch, ridge: float | None, *, joint: bool) -> str:
    """Fit ``stream + scale * projection(x)``; ``joint`` solves for the other projection as well and drops its part."""
    assert branch.projection is not None
    paths = [branch.projection, *([other.projection] if joint and other.projection else [])]
    towards = torch.cat([_weights(site, path) for path in paths])
    own = len(_weights(site, branch.projection))
    sums = []
    for indices in (tuple(site.bench.fitted_on()), site.bench.held_out):
        equations = NormalEquations(towards.shape[0], towards.shape[1], towards.device)
        for rows in site.rows(indices, [branch.projection, *{other.path, other.projection or other.path}]):
            wanted = (rows.target - rows.given) / branch.scale
            if not joint:
                wanted = wanted - rows.out[other.path].float()
            equations.add(_design(site, rows, paths), wanted, rows.relative)
        sums.append(equations)
    weights, _, _ = best_ridge(sums[0], sums[1], towards, RIDGES if ridge is None else (ridge,))
    _put(site, branch.projection, weights[:own])
    return ""


def _fit_normed(site: Site, branch: Branch, other: Branch, ridge: float | None) -> str:
    """Fit ``stream + scale * norm(projection(x))``: directions by the projection, each channel's size by the norm."""
    assert branch.projection is not None
    assert branch.norm is not None
    path, norm = branch.projection, branch.norm
    watched = [path, norm, other.path]
    gain = _gain(site, watched, branch)
    if gain is None:
        return "the norm behind it is not an RMS norm with a weight; it stays as it is"
    towards = _weights(site, path)
    sums = []
    for indices in (tuple(site.bench.fitted_on()), site.bench.held_out):
        equations = NormalEquations(towards.shape[0], towards.shape[1], towards.device)
        for rows in site.rows(indices, watched):
            wanted, size = _added(rows, branch, other), _rms(rows.out[path])
            direction = wanted / gain
            length = _rms(direction).clamp(min=1e-12)
            # The norm keeps directions alone; what is asked for is the old size in the new direction.
            counts = rows.relative * (length / size).squeeze(-1).double().pow(2)
            equations.add(_design(site, rows, [path]), direction / length * size, counts)
        sums.append(equations)
    weights, _, _ = best_ridge(sums[0], sums[1], towards, RIDGES if ridge is None else (ridge,))
    _put(site, path, weights)
    top = torch.zeros_like(gain, dtype=torch.float64)
    bottom = torch.zeros_like(top)
    for rows in site.rows(tuple(site.bench.fitted_on()), watched):
        made = (rows.out[path].float() / _rms(rows.out[path])).double()
        counts = rows.relative.unsqueeze(-1)
        top += (counts * made * _added(rows, branch, other).double()).sum(0)
        bottom += (counts * made.pow(2)).sum(0)
    old = site.module.get_submodule(norm).get_parameter("weight").detach()
    change = torch.where(bottom > 0, top / bottom.clamp(min=1e-30) - gain.double(), 0.0)
    site.bench.put(site.layer, f"{norm}.weight", old.double() + change)
    return ""


def _added(rows: Rows, branch: Branch, other: Branch) -> torch.Tensor:
    """What the branch should add, before it is scaled."""
    return (rows.target - rows.given) / branch.scale - rows.out[other.path].float()


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.float().pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12)


def _gain(site: Site, watched: Sequence[str], branch: Branch) -> torch.Tensor | None:
    """What the norm multiplies each channel by, whatever its weight means (w, or 1 + w); None for another kind."""
    assert branch.projection is not None
    assert branch.norm is not None
    if site.module.get_submodule(branch.norm)._parameters.get("bias") is not None:
        return None
    rows = next(site.rows((0,), watched))
    unit, out = rows.out[branch.projection].float() / _rms(rows.out[branch.projection]), rows.out[branch.norm].float()
    gain = (unit * out).sum(0) / unit.pow(2).sum(0).clamp(min=1e-12)
    if float((out - unit * gain).norm()) > 1e-2 * float(out.norm()):
        return None
    return torch.where(gain.abs() < 1e-4, torch.full_like(gain, 1e-4), gain)
