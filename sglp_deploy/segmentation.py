"""Where a network's layers change character: the exact optimal cut of an ordered profile (Fisher 1958).

Segments are contiguous by construction.  So a plan can promise that no stretch of the network disappears whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.similarity import SimilarityMatrix

PROFILES: Final = ("row_sum", "rows")
_EPS: Final = float(np.finfo(np.float64).eps)
_TIE: Final = 1e-12  # two sums of the same squares in another order differ by less than this, relatively


@dataclass(frozen=True)
class Segmentation:
    """An optimal cut of L ordered layers into K contiguous segments.

    Attributes:
        boundaries: K + 1 layer numbers, from 0 to L, strictly rising; segment s runs from boundaries[s] up to, but not
            including, boundaries[s + 1].
        loss: Sum over segments of the squared distances to the segment's mean (the profile's unit, squared).
        losses: The optimal loss for K = 1 ... L, so that another K can be judged without the profile.
        profile: What was cut: "row_sum" or "rows" of a similarity matrix, or "given" for an array.

    Raises:
        PlanError: If the boundaries or the losses contradict each other.
    """

    boundaries: tuple[int, ...]
    loss: float
    losses: tuple[float, ...]
    profile: str

    def __post_init__(self) -> None:
        cuts, losses = self.boundaries, self.losses
        fault = None
        if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != len(losses):
            fault = f"boundaries {cuts} do not run from 0 to the {len(losses)} layers of the loss curve"
        elif any(right <= left for left, right in pairwise(cuts)):
            fault = f"boundaries {cuts} do not rise"
        elif not np.isfinite(losses).all() or min(losses) < 0:
            fault = "the loss curve holds a negative or non-finite value"
        elif any(after > before + 1e-9 * losses[0] for before, after in pairwise(losses)):
            fault = "the loss curve rises"
        elif self.loss != losses[len(cuts) - 2]:
            fault = f"loss {self.loss} is not the curve's value for {len(cuts) - 1} segments"
        if fault:
            raise PlanError(f"this is no optimal segmentation; {fault}; make it with fisher_segmentation")

    @property
    def n_segments(self) -> int:
        """K, the number of segments."""
        return len(self.boundaries) - 1

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return self.boundaries[-1]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The segments as half-open ranges of layer numbers, in order."""
        return tuple(zip(self.boundaries[:-1], self.boundaries[1:], strict=True))


def fisher_segmentation(
    profile: SimilarityMatrix | ArrayLike, n_segments: int, *, kind: str = "row_sum"
) -> Segmentation:
    """Cut the ordered layers into contiguous segments with the least summed within-segment scatter, exactly.

    Dynamic programming with stored back-pointers: O(L^2 K) time for K segments, O(L^2) memory besides; the curve over
    all K that comes with the answer makes it O(L^3), a few milliseconds for a hundred layers.

    Args:
        profile: One number or one vector per layer, shape (L,) or (L, d); or a similarity matrix.
        n_segments: K, from 1 to L.
        kind: How a similarity matrix becomes a profile: "row_sum" (a_i = sum_j CKA(i, j), as the code of SGLP's
            ancestor does) or "rows" (row i as a vector).  Not used for an array.

    Returns:
        The optimal segmentation and the loss curve.  Of equally good answers the one with the earliest last cut is
        taken, then the earliest cut before it, and so on; losses within 1e-12 of each other count as equal.

    Raises:
        PlanError: If ``n_segments`` is outside 1..L, or the profile is empty or not finite.
        ConfigError: If ``kind`` is unknown.

    Source:
        Fisher (1958), JASA 53, 789-798; used for layers in SGLP (arXiv:2410.14720).  The ancestor's published code
        reads its boundaries back without stored arg-mins and is usually not optimal; this is.
    """
    points = _points(profile, kind)
    n_layers = len(points)
    _check_count("n_segments", n_segments, n_layers)
    losses, previous = _solve(points, n_layers)
    cuts = [n_layers]
    for k in range(n_segments, 0, -1):
        cuts.append(int(previous[k - 1, cuts[-1]]))
    label = kind if isinstance(profile, SimilarityMatrix) else "given"
    return Segmentation(tuple(reversed(cuts)), float(losses[n_segments - 1]), tuple(losses.tolist()), label)


def loss_curve(
    profile: SimilarityMatrix | ArrayLike, max_segments: int | None = None, *, kind: str = "row_sum"
) -> NDArray[np.float64]:
    """The optimal loss for K = 1 ... ``max_segments`` (L when omitted), shape (max_segments,); it never rises.

    Raises:
        PlanError: If ``max_segments`` is outside 1..L, or the profile is empty or not finite.
        ConfigError: If ``kind`` is unknown.
    """
    points = _points(profile, kind)
    if max_segments is not None:
        _check_count("max_segments", max_segments, len(points))
    return _solve(points, max_segments or len(points))[0]


def choose_n_segments(curve: Sequence[float] | NDArray[np.float64], limit: int, threshold: float = 0.05) -> int:
    """The least K that explains all but ``threshold`` of the profile's scatter, at most ``limit``.

    A flat profile has nothing to explain and gets one segment.

    Args:
        curve: The optimal loss for K = 1, 2, ... (see :func:`loss_curve`).
        limit: The largest K the budget allows, at least 1.
        threshold: Share of ``curve[0]`` that may stay unexplained, in [0, 1).

    Raises:
        ConfigError: If the curve is empty, ``limit`` is below 1 or ``threshold`` is outside [0, 1).

    Source:
        Ours.  SGLP's abstract gives no rule; its ancestor takes the largest K up to a bound set by hand whose
        step still gains 5 %, and a related script's score picks its upper bound nearly always.
    """
    faults = []
    if not len(curve):
        faults.append("curve is empty; K is read off the loss for 1, 2, ... segments; pass loss_curve(profile)")
    if limit < 1:
        faults.append(f"limit={limit} leaves no segment; a plan has at least one; pass limit>=1")
    if not 0 <= threshold < 1:
        faults.append(
            f"threshold={threshold} is no share; it is compared with loss(K)/loss(1); pass 0 <= threshold < 1"
        )
    if faults:
        raise ConfigError(faults)
    enough = np.asarray(curve, dtype=np.float64) <= threshold * float(curve[0])
    wanted = int(enough.argmax()) + 1 if enough.any() else len(curve)
    return min(wanted, limit)


def _points(profile: SimilarityMatrix | ArrayLike, kind: str) -> NDArray[np.float64]:
    """The profile as vectors, shape (L, d)."""
    if kind not in PROFILES:
        raise unknown_name("profile", kind, PROFILES)
    if isinstance(profile, SimilarityMatrix):
        points = profile.values.sum(axis=1) if kind == "row_sum" else profile.values
    else:
        points = np.asarray(profile, dtype=np.float64)
    if points.ndim not in (1, 2) or not points.size:
        raise PlanError(
            f"the profile has shape {points.shape}; one value or vector per layer is cut; pass (L,) or (L, d)"
        )
    if not np.isfinite(points).all():
        layer = int(np.argwhere(~np.isfinite(points))[0][0])
        raise PlanError(f"the profile of layer {layer} is not finite; scatter is undefined; check the statistics")
    return points.reshape(len(points), -1)


def _check_count(name: str, value: int, n_layers: int) -> None:
    if not 1 <= value <= n_layers:
        raise PlanError(
            f"{name}={value} is outside 1..{n_layers}; every segment holds at least one of the {n_layers} layers; "
            f"pass 1 <= {name} <= {n_layers}"
        )


def _segment_costs(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scatter of every segment [i, j), shape (L, L + 1), infinite where j <= i.

    Welford's update, for all starts at once.  Differences of prefix sums of squares are as fast but cancel: a profile
    with one large jump loses the small differences inside its segments, and costs can turn negative.
    """
    n_layers = len(points)
    costs = np.full((n_layers, n_layers + 1), np.inf)
    means = np.zeros_like(points)
    scatter = np.zeros(n_layers)
    for end, point in enumerate(points):
        started = slice(0, end + 1)
        count = np.arange(end + 1, 0, -1, dtype=np.float64)  # layers in [i, end] for i = 0 ... end
        delta = point - means[started]
        means[started] += delta / count[:, None]
        scatter[started] += (delta**2).sum(axis=1) * (count - 1) / count
        costs[started, end + 1] = scatter[started]
    # Row sums of an even matrix differ in the last bit; such a profile is flat and not a staircase of rounding.
    if costs[0, n_layers] <= points.size * (4 * _EPS * float(np.abs(points).max())) ** 2:
        costs[np.isfinite(costs)] = 0.0
    return costs


def _solve(points: NDArray[np.float64], max_segments: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Optimal losses (max_segments,) and back-pointers (max_segments, L + 1): where the last of k segments starts."""
    costs = _segment_costs(points)
    n_layers = len(points)
    losses = np.empty(max_segments)
    previous = np.zeros((max_segments, n_layers + 1), dtype=np.int64)
    best = costs[0]  # best[j]: the first j layers in k segments; k = 1 here
    losses[0] = best[n_layers]
    for k in range(1, max_segments):
        totals = best[:n_layers, None] + costs
        best = totals.min(axis=0)
        previous[k] = (totals <= best * (1 + _TIE)).argmax(axis=0)
        losses[k] = best[n_layers]
    return losses, previous
