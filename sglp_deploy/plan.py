"""The decision, and nothing but the decision: which layers stay, why, and for which model, as one file.

``plan.json`` is what a person reviews and what every later stage takes.  It knows no torch, so it can be made, read and
checked on a machine that has none.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ArtifactError, ConfigError, PlanError
from sglp_deploy.evidence.statistics import LayerStats
from sglp_deploy.planners.budget import (
    Budget,
    check_segments,
    kept,
    select_drops,
    select_drops_for_parameters,
    select_groups,
)

__all__ = [
    "Budget",
    "LayerDecision",
    "Planner",
    "PlannerOptions",
    "PruningPlan",
    "by_hand_plan",
    "keep_all_plan",
    "make_plan",
    "planner_names",
    "resolve_drops",
    "select_drops",
]

SCHEMA: Final = "plan/2"  # history: 1 = first; 2 = stack, config_changes
_ADDED_IN_2: Final[Mapping[str, Any]] = {"stack": None, "config_changes": ()}  # what a plan/1 means by saying nothing

# Named, not imported: planners stand above this module and import it.
PLANNERS: Final[Mapping[str, str]] = {"sglp": "sglp_deploy.planners.sglp:plan_layers"}
PLANNER_GROUP: Final = "sglp_deploy.planners"

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PlannerOptions:
    """What a caller may ask of a planner; a planner ignores what its method has no use for.

    Attributes:
        criterion: Name of the layer score (see :data:`sglp_deploy.importance.CRITERIA`).
        n_segments: K, or None to let the method choose one the budget allows.
        profile: What is cut into segments: "row_sum" or "rows".
        estimator: CKA estimator (see :data:`sglp_deploy.similarity.ESTIMATORS`).
        quota: "global" or "proportional".
        seed: For methods that draw at random.
        groups: Layers that can only go together (whole periods of a pattern), or empty.
    """

    criterion: str = "grad-norm"
    n_segments: int | None = None
    profile: str = "row_sum"
    estimator: str = "unbiased"
    quota: str = "proportional"
    seed: int = 0
    groups: tuple[tuple[int, ...], ...] = ()


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
    """

    drop: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    segment_losses: tuple[float, ...]
    criterion: str
    scores: Mapping[str, tuple[float, ...]]
    quota: str | None = None
    similarity: Matrix | None = None
    elapsed_s: Mapping[str, float] = field(default_factory=dict)


class Planner(Protocol):
    """A depth-pruning method: statistics and a budget in, a decision out; no model, no file, no clock but its own."""

    def __call__(self, stats: LayerStats, budget: Budget, options: PlannerOptions) -> LayerDecision:
        """Decide which layers go; :func:`resolve_drops` turns scores and segments into the answer."""
        ...


@dataclass(frozen=True)
class PruningPlan:
    """Which layers of one model stay, and everything that led to it; the content of ``plan.json``.

    Attributes:
        method: Name of the planner, or "keep-all".
        n_layers: L, layers of the model before pruning.
        keep: Layers that stay, ascending.
        drop: Layers that go, ascending.
        segments: Half-open ranges that cover 0..L in order.
        segment_losses: Optimal loss for K = 1 ... L, or empty for a method without segmentation.
        scores: Layer scores by criterion, each (L).
        similarity: CKA between layers, (L, L), or None when left out.
        criterion: The key of ``scores`` that ranked the layers; None when nothing was ranked.
        quota: "global", "proportional" or None.
        budget: The one thing that was asked for, by name: drop, keep, fraction or max_parameters.
        model: ``{"id", "fingerprint", "config_digest", "gguf_file"}`` of the model the plan is for; more is allowed.
        calibration: ``{"digest", "n_samples", "n_tokens"}`` and more, or None.
        compensation: How the removed layers are made up for, or None.
        seed: Seed of everything drawn at random.
        versions: Versions of what made the plan; not part of its digest.
        elapsed_s: Wall time by stage; not part of its digest.
        options: What the planner was asked and how the statistics were taken.
        stack: Path of the layer stack the numbers count in; None for the model's first.
        config_changes: Configuration entries that removing the layers changes, or that nobody knows the meaning of:
            ``{"entry", "before", "after", "rule"}``.

    Raises:
        PlanError: If the fields contradict each other.
    """

    method: str
    n_layers: int
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    segments: tuple[tuple[int, int], ...]
    segment_losses: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    similarity: Matrix | None
    criterion: str | None
    quota: str | None
    budget: Mapping[str, Any]
    model: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    compensation: Mapping[str, Any] | None = None
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    elapsed_s: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    stack: str | None = None
    config_changes: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault:
            raise PlanError(f"the plan contradicts itself; {fault}; make the plan again instead of editing it")

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``: every field as JSON values, with the schema first."""
        return {"schema": SCHEMA} | {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: If the schema is unknown, or a field is missing, unknown or mistyped.
            PlanError: If the fields contradict each other.
        """
        if value.get("schema") == "plan/1":
            value = {**_ADDED_IN_2, **value, "schema": SCHEMA}
        if value.get("schema") != SCHEMA:
            raise ArtifactError(
                f"the plan has schema {value.get('schema')!r}; this version reads {SCHEMA!r}; make the plan again"
            )
        names = {item.name for item in fields(cls)}
        given = set(value) - {"schema"}
        if given != names:
            wrong = [f"{name} is missing" for name in sorted(names - given)]
            wrong += [f"{name} is unknown" for name in sorted(given - names)]
            raise ArtifactError(f"the plan's fields are wrong; {', '.join(wrong)}; make the plan again")
        facts = {name: value[name] for name in names}
        try:
            for name in ("keep", "drop"):
                facts[name] = tuple(_whole(layer) for layer in facts[name])
            facts["segments"] = tuple((_whole(start), _whole(end)) for start, end in facts["segments"])
            facts["segment_losses"] = tuple(float(loss) for loss in facts["segment_losses"])
            facts["scores"] = {name: tuple(float(x) for x in row) for name, row in facts["scores"].items()}
            if facts["similarity"] is not None:
                facts["similarity"] = tuple(tuple(float(x) for x in row) for row in facts["similarity"])
            facts["n_layers"], facts["seed"] = _whole(facts["n_layers"]), _whole(facts["seed"])
            for name in ("budget", "model", "versions", "elapsed_s", "options"):
                facts[name] = dict(facts[name])
            for name in ("calibration", "compensation"):
                facts[name] = None if facts[name] is None else dict(facts[name])
            facts["config_changes"] = tuple(dict(change) for change in facts["config_changes"])
        except (TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"a field of the plan has the wrong type; {error}; make the plan again") from error
        return cls(**facts)

    def save(self, path: str | Path) -> None:
        """Write ``plan.json`` atomically.

        Raises:
            StorageError: If it cannot be written; an older file stays as it was.
        """
        _io.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            ArtifactError: If the file is missing, not JSON, of an unknown schema, or malformed.
            PlanError: If the plan contradicts itself.
        """
        return cls.from_json(_io.read_json(Path(path), "plan", (1, 2)))

    def digest(self) -> str:
        """SHA-256 of the plan without its wall times and versions: equal decisions have equal digests."""
        value = {k: v for k, v in self.to_json().items() if k not in ("elapsed_s", "versions")}
        if all(getattr(self, name) == nothing for name, nothing in _ADDED_IN_2.items()):
            # Artifacts written under plan/1 name their plan by this digest, and must go on being verified.
            value = {k: v for k, v in value.items() if k not in _ADDED_IN_2} | {"schema": "plan/1"}
        return _io.sha256_json(value)

    def check_model(self, fingerprint: str, n_layers: int, model_id: str = "") -> None:
        """Refuse to be applied to another model than the one the plan was made for.

        Raises:
            PlanError: If the fingerprint or the number of layers differs; both models are named.
        """
        if fingerprint == self.model["fingerprint"] and n_layers == self.n_layers:
            return
        raise PlanError(
            f"the plan is for {self.model['id']} (fingerprint {self.model['fingerprint']}, {self.n_layers} layers) and "
            f"not for {model_id or 'the given model'} (fingerprint {fingerprint}, {n_layers} layers); a layer number "
            "means another layer there; make a plan for this model"
        )


def make_plan(
    stats: LayerStats,
    budget: Budget,
    *,
    method: str = "sglp",
    criterion: str = "grad-norm",
    n_segments: int | None = None,
    profile: str = "row_sum",
    estimator: str = "unbiased",
    quota: str = "proportional",
    groups: tuple[tuple[int, ...], ...] = (),
    model: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    seed: int = 0,
    keep_matrix: bool = True,
    versions: Mapping[str, str] | None = None,
) -> PruningPlan:
    """Decide which layers to remove.  Equal input gives an equal plan; nothing is drawn at random.

    Args:
        stats: What the calibration pass left.
        budget: How much to remove.
        method: Name of a planner, ours or a third party's (entry-point group ``sglp_deploy.planners``).
        criterion: Layer score: "grad-norm", "grad-norm-weight-sum", "grad-norm-output", "block-influence", "taylor".
        n_segments: K; when omitted, the least K that explains 95 % of the profile, as far as the budget allows.
        profile: "row_sum" or "rows" of the similarity matrix.
        estimator: CKA estimator: "unbiased", "biased" or "mean_of_ratios".
        quota: "global" or "proportional".
        groups: Layers that can only go together (see :func:`sglp_deploy.models.patterns.pattern_groups`), or empty.
        model: ``{"id", "fingerprint", "config_digest", "gguf_file"}`` of the model.
        calibration: Facts of the calibration set, its ``digest`` above all; counts come from ``stats``.
        seed: Recorded, and given to planners that draw.
        keep_matrix: Store the similarity matrix in the plan.
        versions: Recorded; this package's, Python's and numpy's when omitted.

    Raises:
        ConfigError: If a name is unknown; the message has the nearest match and the list.
        PlanError: If the budget cannot be met.
        CalibrationError: If the statistics cannot support a plan.
    """
    options = PlannerOptions(criterion, n_segments, profile, estimator, quota, seed, groups)
    decision = _planner(method)(stats, budget, options)
    together = {layer for group in groups if set(group) <= set(decision.drop) for layer in group}
    if groups and together != set(decision.drop):
        raise PlanError(
            f"the planner {method!r} removed layers {sorted(set(decision.drop) - together)} alone, whose pattern has "
            "to stay; it does not support preserve_pattern; choose another method"
        )
    counts = {"n_samples": stats.n_samples, "n_tokens": stats.n_tokens, "n_rows": stats.n_rows}
    return PruningPlan(
        method=method,
        n_layers=stats.n_layers,
        keep=kept(stats.n_layers, decision.drop),
        drop=tuple(sorted(decision.drop)),
        segments=decision.segments,
        segment_losses=decision.segment_losses,
        scores=dict(decision.scores),
        similarity=decision.similarity if keep_matrix else None,
        criterion=decision.criterion,
        quota=decision.quota,
        budget=budget.to_json(),
        model=dict(model),
        calibration={**(calibration or {}), **counts},
        compensation=None,
        seed=seed,
        versions=dict(_versions() if versions is None else versions),
        elapsed_s={"calibration": stats.elapsed_s, **decision.elapsed_s},
        options={
            "n_segments": n_segments,
            "profile": profile,
            "estimator": estimator,
            "statistics": dict(stats.options),
        }
        | ({"groups": [list(group) for group in groups]} if groups else {}),
    )


def keep_all_plan(
    n_layers: int,
    model: Mapping[str, Any],
    *,
    calibration: Mapping[str, Any] | None = None,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
) -> PruningPlan:
    """The baseline: the plan of method "keep-all" that removes nothing; needs no statistics."""
    return PruningPlan(
        method="keep-all",
        n_layers=n_layers,
        keep=tuple(range(n_layers)),
        drop=(),
        segments=((0, n_layers),),
        segment_losses=(),
        scores={},
        similarity=None,
        criterion=None,
        quota=None,
        budget=Budget(drop=0).to_json(),
        model=dict(model),
        calibration=None if calibration is None else dict(calibration),
        seed=seed,
        versions=dict(_versions() if versions is None else versions),
    )


def by_hand_plan(
    n_layers: int,
    drop: Sequence[int],
    model: Mapping[str, Any],
    *,
    stack: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> PruningPlan:
    """The plan of method "by-hand": a person names the layers to remove; needs no statistics.

    Raises:
        PlanError: If a layer is named twice, is outside 0..L-1, or none would stay.
    """
    layers = sorted(drop)
    if len(set(layers)) != len(layers) or not set(layers) <= set(range(n_layers)) or len(layers) >= n_layers:
        raise PlanError(
            f"layers {layers} cannot be removed; each must be named once, lie in 0..{n_layers - 1}, and one must stay; "
            "correct the list"
        )
    plain = keep_all_plan(n_layers, model, versions=versions)
    return replace(
        plain,
        method="by-hand",
        keep=kept(n_layers, layers),
        drop=tuple(layers),
        budget=Budget(drop=len(layers)).to_json(),
        stack=stack,
    )


def resolve_drops(
    scores: Any,
    segments: tuple[tuple[int, int], ...],
    stats: LayerStats,
    budget: Budget,
    quota: str = "global",
    groups: tuple[tuple[int, ...], ...] = (),
) -> tuple[int, ...]:
    """Layers to remove for any kind of budget, in the order they go (see :func:`select_drops`).

    With ``groups`` whole groups go (see :func:`sglp_deploy.planners.budget.select_groups`), and ``quota`` has no say.

    Raises:
        PlanError: If the segments and the unprunable layers do not allow the budget.
        ConfigError: If the quota is unknown.
    """
    n_drop = budget.n_drop(stats.n_layers)
    if groups:
        if n_drop is None:
            raise PlanError(
                "max_parameters cannot be combined with preserve_pattern; whole periods go, by number of layers; pass "
                "drop or keep"
            )
        return select_groups(scores, segments, groups, n_drop)
    if n_drop is not None:
        return select_drops(scores, segments, stats.prunable, n_drop, quota)
    assert budget.max_parameters is not None  # the only budget whose count the ranking decides
    return select_drops_for_parameters(
        scores, segments, stats.prunable, stats.parameters, stats.other_parameters, budget.max_parameters, quota
    )


def planner_names() -> list[str]:
    """Names ``make_plan`` accepts: ours and those of installed third parties."""
    return sorted({*PLANNERS, *(entry.name for entry in metadata.entry_points(group=PLANNER_GROUP))})


def _planner(method: str) -> Planner:
    """The planner of that name; a third party's never replaces one of ours."""
    if method in PLANNERS:
        module, _, attribute = PLANNERS[method].partition(":")
        return cast(Planner, getattr(importlib.import_module(module), attribute))
    for entry in metadata.entry_points(group=PLANNER_GROUP, name=method):
        try:
            return cast(Planner, entry.load())
        except Exception as error:
            raise ConfigError(
                f"the planner {method!r} ({entry.value}) cannot be loaded; {error}; reinstall or remove that package"
            ) from error
    raise unknown_name("method", method, planner_names())


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("sglp-deploy")
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH has no distribution of its own
        own = "not installed"
    return {"python": platform.python_version(), "sglp-deploy": own, "numpy": np.__version__}


def _fault(plan: PruningPlan) -> str | None:
    """The first invariant a plan breaks, in words."""
    layers = set(range(plan.n_layers))
    for name, chosen in (("keep", plan.keep), ("drop", plan.drop)):
        if list(chosen) != sorted(set(chosen)):
            return f"{name} {list(chosen)} is not in rising order without repeats"
        if not layers.issuperset(chosen):
            return f"{name} {list(chosen)} names a layer outside 0..{plan.n_layers - 1}"
    if not plan.keep:
        return "no layer is kept"
    if layers.difference(plan.drop) != set(plan.keep):
        return f"keep {list(plan.keep)} and drop {list(plan.drop)} do not complete each other"
    if wrong := check_segments(plan.segments, plan.n_layers):
        return wrong
    for start, end in plan.segments:
        if not any(start <= layer < end for layer in plan.keep):
            return f"segment [{start}, {end}) has no survivor"
    if len(plan.segment_losses) not in (0, plan.n_layers) or not np.isfinite(plan.segment_losses).all():
        return f"segment_losses is not one finite number for each of 1..{plan.n_layers} segments"
    for name, row in plan.scores.items():
        if len(row) != plan.n_layers or not np.isfinite(row).all():
            return f"the {name} scores are not one finite number for each of {plan.n_layers} layers"
    if plan.criterion is not None and plan.criterion not in plan.scores:
        return f"criterion {plan.criterion!r} has no scores"
    if plan.similarity is not None:
        if {len(plan.similarity), *map(len, plan.similarity)} != {plan.n_layers}:
            return f"similarity is not {plan.n_layers} by {plan.n_layers}"
        if not np.isfinite(plan.similarity).all():
            return "similarity holds NaN or infinity"
    missing = [name for name in ("id", "fingerprint") if not isinstance(plan.model.get(name), str)]
    return f"model lacks {' and '.join(missing)}" if missing else None


def _plain(value: Any) -> Any:
    """Tuples and mappings as the lists and dictionaries of JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    return value
