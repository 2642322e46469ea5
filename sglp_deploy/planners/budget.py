"""How much to remove and, given scores and segments, which layers that means; the arithmetic every planner shares."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError, PlanError

QUOTAS: Final = ("global", "proportional")
_FIELDS: Final = ("drop", "keep", "fraction", "max_parameters")


@dataclass(frozen=True)
class Budget:
    """How much of the model to remove; exactly one of the fields is set.

    Attributes:
        drop: Layers to remove, at least 0.
        keep: Layers to keep, at least 1.
        fraction: Share of the layers to remove, between 0 and 1; rounded down to whole layers.
        max_parameters: Parameters the whole model may have left, at least 1; layers go in rank order until it fits.

    Raises:
        ConfigError: If none or several are set, or one is out of range.
    """

    drop: int | None = None
    keep: int | None = None
    fraction: float | None = None
    max_parameters: int | None = None

    def __post_init__(self) -> None:
        given = self.to_json()
        if len(given) != 1:
            raise ConfigError(
                f"the budget sets {' and '.join(given) or 'nothing'}; one number decides how many layers go; "
                "pass exactly one of drop, keep, max_parameters"
            )
        ((name, value),) = given.items()
        if name == "fraction":
            if not 0 < value < 1:
                raise ConfigError(
                    f"drop={value} is a float, so it is read as a share of the layers; it must lie between 0 and 1; "
                    "pass a whole number (drop=6) to count layers"
                )
            object.__setattr__(self, name, float(value))
            return
        least = 0 if name == "drop" else 1
        try:
            whole = operator.index(value)
        except TypeError:
            raise ConfigError(f"{name}={value!r} is not a whole number; it counts; pass {name}={least + 5}") from None
        if isinstance(value, bool) or whole < least:
            raise ConfigError(f"{name}={value!r} is out of range; it counts from {least}; pass {name}>={least}")
        object.__setattr__(self, name, whole)

    @classmethod
    def parse(
        cls, *, drop: int | float | None = None, keep: int | None = None, max_parameters: int | None = None
    ) -> Budget:
        """The budget a user means: a whole ``drop`` counts layers, a float ``drop`` is a share of them."""
        if isinstance(drop, float):
            return cls(fraction=drop, keep=keep, max_parameters=max_parameters)
        return cls(drop=drop, keep=keep, max_parameters=max_parameters)

    def n_drop(self, n_layers: int) -> int | None:
        """Layers to remove of ``n_layers``, or None when only the ranking can tell (``max_parameters``).

        Raises:
            PlanError: If no layer would stay, more would stay than there are, or the share is less than one layer.
        """
        if self.max_parameters is not None:
            return None
        if self.keep is not None:
            if self.keep > n_layers:
                raise PlanError(
                    f"keep={self.keep} exceeds the model's {n_layers} layers; a plan only removes; "
                    f"pass keep<={n_layers}"
                )
            return n_layers - self.keep
        if self.fraction is not None:
            count = math.floor(self.fraction * n_layers + 1e-9)  # 0.29 * 100 is 28.999999999999996
            if not count:
                raise PlanError(
                    f"drop={self.fraction} of {n_layers} layers is less than one layer; nothing would be removed; "
                    f"pass drop>={math.ceil(1e4 / n_layers) / 1e4} or drop=1"
                )
            return count
        assert self.drop is not None  # the only one left, by construction
        if self.drop >= n_layers:
            raise PlanError(
                f"drop={self.drop} removes all {n_layers} layers; at least one must stay; pass drop<={n_layers - 1}"
            )
        return self.drop

    def to_json(self) -> dict[str, Any]:
        """The one field that is set, by name."""
        return {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}


def check_parameter_budget(budget: Budget, sizes: Mapping[str, Any]) -> None:
    """Refuse a parameter budget below the model with its smallest layer alone; segments may still ask for more.

    Args:
        budget: Any budget; one that counts layers passes.
        sizes: ``parameters`` and ``layer_parameters`` of the model.

    Raises:
        PlanError: With the least number of parameters that can be met.
    """
    least = sizes["parameters"] - sum(sizes["layer_parameters"]) + min(sizes["layer_parameters"])
    if budget.max_parameters is not None and budget.max_parameters < least:
        raise PlanError(
            f"max_parameters={budget.max_parameters} cannot be met; embeddings, head and one layer alone have {least} "
            f"of {sizes['parameters']}; pass max_parameters>={least}"
        )


class LayerFacts(Protocol):
    """What removal must know of the layers; statistics and evidence both have it."""

    @property
    def n_layers(self) -> int:
        """L."""
        ...

    @property
    def prunable(self) -> tuple[bool, ...]:
        """Whether each layer may be removed (L)."""
        ...

    @property
    def parameters(self) -> NDArray[np.int64]:
        """Parameters in each layer (L)."""
        ...

    @property
    def other_parameters(self) -> int:
        """Parameters outside the layers."""
        ...

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Layers that can only go together (whole periods of a pattern), or empty."""
        ...


def resolve_drops(
    scores: ArrayLike,
    segments: Sequence[tuple[int, int]],
    layers: LayerFacts,
    budget: Budget,
    quota: str = "global",
) -> tuple[int, ...]:
    """Layers to remove for any kind of budget, in the order they go (see :func:`select_drops`).

    Where layers can only go together whole groups go (see :func:`select_groups`), and ``quota`` has no say.

    Args:
        scores: Importance of each layer, shape (L,), finite.
        segments: Half-open ranges that cover 0..L in order; one range for a method without segments.
        layers: The evidence a planner is given.
        budget: How much to remove.
        quota: "global" or "proportional".

    Raises:
        PlanError: If the segments and the unprunable layers do not allow the budget.
        ConfigError: If the quota is unknown.
    """
    n_drop = budget.n_drop(layers.n_layers)
    if layers.groups:
        if n_drop is None:
            raise PlanError(
                "max_parameters cannot be combined with preserve_pattern; whole periods go, by number of layers; pass "
                "drop or keep"
            )
        return select_groups(scores, segments, layers.groups, n_drop)
    if n_drop is not None:
        return select_drops(scores, segments, layers.prunable, n_drop, quota)
    assert budget.max_parameters is not None  # the only budget whose count the ranking decides
    return select_drops_for_parameters(
        scores, segments, layers.prunable, layers.parameters, layers.other_parameters, budget.max_parameters, quota
    )


def select_drops(
    scores: ArrayLike,
    segments: Sequence[tuple[int, int]],
    prunable: Sequence[bool],
    n_drop: int,
    quota: str = "global",
) -> tuple[int, ...]:
    """Choose the layers to remove: lowest score first, every segment keeps at least one layer.

    Args:
        scores: Importance of each layer, shape (L,), finite.
        segments: Half-open ranges that cover 0..L in order.
        prunable: Whether each layer may be removed (L).
        n_drop: Layers to remove.
        quota: "global" ranks all layers together and skips a segment's last survivor.  "proportional" shares
            ``n_drop`` between segments by their prunable layers (largest remainder, capped so that one layer stays)
            and ranks inside each.

    Returns:
        The layers in the order they go: ascending score.  Of equal scores the deeper layer goes first, because an
        error made late passes through fewer layers.

    Raises:
        PlanError: If the segments do not allow ``n_drop`` removals; the message has the largest number they do.
        ConfigError: If the quota is unknown.
    """
    if quota not in QUOTAS:
        raise unknown_name("quota", quota, QUOTAS)
    values = np.asarray(scores, dtype=np.float64)
    rooms = _rooms(segments, prunable)
    _check_possible(n_drop, len(values), segments, prunable, sum(rooms))
    if quota == "proportional":
        counts = [sum(prunable[start:end]) for start, end in segments]
        rooms = _shares(n_drop, counts, rooms)
    segment_of = [index for index, (start, end) in enumerate(segments) for _ in range(start, end)]
    drops: list[int] = []
    for layer in sorted(range(len(values)), key=lambda index: (values[index], -index)):
        if len(drops) == n_drop:
            break
        if prunable[layer] and rooms[segment_of[layer]]:
            rooms[segment_of[layer]] -= 1
            drops.append(layer)
    return tuple(drops)


def select_drops_for_parameters(
    scores: ArrayLike,
    segments: Sequence[tuple[int, int]],
    prunable: Sequence[bool],
    parameters: NDArray[np.int64],
    other_parameters: int,
    max_parameters: int,
    quota: str = "global",
) -> tuple[int, ...]:
    """The shortest answer of :func:`select_drops` that leaves at most ``max_parameters`` in the whole model.

    Args:
        scores: As in :func:`select_drops`, like ``segments``, ``prunable`` and ``quota``.
        segments: Half-open ranges that cover 0..L in order.
        prunable: Whether each layer may be removed (L).
        parameters: Parameters of each layer (L).
        other_parameters: Parameters outside the layers.
        max_parameters: The most the pruned model may have.
        quota: "global" or "proportional".

    Raises:
        PlanError: If even the most removals these segments allow leave too many parameters.
        ConfigError: If the quota is unknown.
    """
    left = total = int(parameters.sum()) + other_parameters
    for n_drop in range(sum(_rooms(segments, prunable)) + 1):
        drops = select_drops(scores, segments, prunable, n_drop, quota)
        left = total - int(parameters[list(drops)].sum())
        if left <= max_parameters:
            return drops
    raise PlanError(
        f"max_parameters={max_parameters} cannot be met; {other_parameters} lie outside the layers and one layer of "
        f"each of the {len(segments)} segments stays, which leaves {left} of {total}; pass max_parameters>={left}"
        + (" or fewer segments" if len(segments) > 1 else "")
    )


def select_groups(
    scores: ArrayLike,
    segments: Sequence[tuple[int, int]],
    groups: Sequence[Sequence[int]],
    n_drop: int,
) -> tuple[int, ...]:
    """Choose whole groups of layers to remove: lowest summed score first, every segment keeps at least one layer.

    Args:
        scores: Importance of each layer, shape (L,), finite.
        segments: Half-open ranges that cover 0..L in order.
        groups: Layers that can only go together, in order; see :func:`sglp_deploy.models.patterns.pattern_groups`.
        n_drop: Layers to remove, the sum of some groups' sizes.

    Returns:
        The layers in the order their groups go; of equal sums the deeper group goes first.

    Raises:
        PlanError: If no choice of groups in rank order comes to ``n_drop``; the message has the counts that do.
    """
    values = np.asarray(scores, dtype=np.float64)
    segment_of = [index for index, (start, end) in enumerate(segments) for _ in range(start, end)]
    left = [end - start for start, end in segments]
    order: list[int] = []
    counts = [0]
    for group in sorted(groups, key=lambda layers: (values[list(layers)].sum(), -layers[0])):
        after = list(left)
        for layer in group:
            after[segment_of[layer]] -= 1
        if min(after) >= 1:
            left = after
            order += group
            counts.append(len(order))
    if n_drop not in counts:
        raise PlanError(
            f"drop={n_drop} is no number of whole periods these {len(segments)} segments can lose; the pattern of the "
            f"layers repeats every {min(map(len, groups))}; pass one of drop="
            f"{', '.join(map(str, counts[1:])) or 'none'}, or fewer segments"
        )
    return tuple(order[:n_drop])


def _rooms(segments: Sequence[tuple[int, int]], prunable: Sequence[bool]) -> list[int]:
    """How many layers each segment can lose and still keep one."""
    return [min(sum(prunable[start:end]), end - start - 1) for start, end in segments]


def _check_possible(
    n_drop: int, n_layers: int, segments: Sequence[tuple[int, int]], prunable: Sequence[bool], most: int
) -> None:
    keep, n_segments = n_layers - n_drop, len(segments)
    if n_drop < 0:
        raise PlanError(f"drop={n_drop} is negative; a plan only removes; pass drop>=0")
    if keep < 1:
        raise PlanError(
            f"drop={n_drop} removes all {n_layers} layers; at least one must stay; pass drop<={n_layers - 1}"
        )
    fixed = [layer for layer, may_go in enumerate(prunable) if not may_go]
    if n_drop > n_layers - len(fixed):
        raise PlanError(
            f"drop={n_drop} exceeds the {n_layers - len(fixed)} layers that may be removed; layers {fixed} may not; "
            f"pass drop<={min(most, n_layers - len(fixed))}"
        )
    if keep < n_segments:
        raise PlanError(
            f"keep={keep} is below the {n_segments} segments of this plan; every segment keeps a layer; "
            f"pass n_segments<={keep} or keep>={n_layers - most}"
        )
    if n_drop > most:
        raise PlanError(
            f"drop={n_drop} exceeds the {most} layers these {n_segments} segments can lose; every segment keeps a "
            f"layer and layers {fixed} may not go; pass drop<={most} or fewer segments"
        )


def _shares(n_drop: int, counts: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Split ``n_drop`` in proportion to ``counts`` without exceeding ``rooms``: largest remainder, ties deeper."""
    total = sum(counts)
    # In whole numbers (numerators over `total`), so that equal remainders are equal.
    exact = [n_drop * count for count in counts]
    shares = [min(part // total, room) for part, room in zip(exact, rooms, strict=True)] if total else list(rooms)
    while sum(shares) < n_drop:
        open_segments = [index for index, room in enumerate(rooms) if shares[index] < room]
        neediest = max(open_segments, key=lambda index: (exact[index] - shares[index] * total, index))
        shares[neediest] += 1
    return shares


def check_segments(segments: Sequence[Sequence[int]], n_layers: int) -> str | None:
    """What is wrong with ``segments`` as a cover of 0..``n_layers``, or None."""
    edges = [0, *(pair[1] for pair in segments)]
    starts = [pair[0] for pair in segments]
    if not segments or edges[-1] != n_layers or starts != edges[:-1]:
        return f"segments {[list(pair) for pair in segments]} do not cover layers 0 to {n_layers} without a gap"
    if any(end <= start for start, end in segments):
        return f"segments {[list(pair) for pair in segments]} hold an empty range"
    return None


def kept(n_layers: int, drops: Sequence[int]) -> tuple[int, ...]:
    """The layers of ``n_layers`` that are not in ``drops``, in order."""
    gone = set(drops)
    return tuple(layer for layer in range(n_layers) if layer not in gone)
