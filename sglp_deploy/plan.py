"""The decision, and nothing but the decision: which layers stay, why, and for which model, as one file.

``plan.json`` is what a person reviews and what every later stage takes.  It knows no torch.  So it can be made, read
and checked on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from sglp_deploy import _io
from sglp_deploy.artifact import producer_versions
from sglp_deploy.errors import ArtifactError, PlanError
from sglp_deploy.evidence.statistics import LayerStats
from sglp_deploy.overlay import OVERLAY_FILE, Overlay, as_tensor
from sglp_deploy.planners.budget import Budget, kept, resolve_drops, select_drops
from sglp_deploy.planners.invariants import checked, plan_fault
from sglp_deploy.planners.registry import planner, planner_names, read_options, recorded_options
from sglp_deploy.planners.seam import Evidence, FixedEvidence, LayerDecision, Matrix

__all__ = [
    "Budget",
    "LayerDecision",
    "PruningPlan",
    "by_hand_plan",
    "keep_all_plan",
    "make_plan",
    "planner_names",
    "resolve_drops",
    "select_drops",
]

SCHEMA: Final = "plan/3"  # history: 1 = first; 2 = stack, config_changes; 3 = overlay, width, task
_FARTHEST_CKA: Final = 1e3  # the unbiased estimator leaves [0, 1] where its denominator is small
VERSIONS: Final = (1, 2, 3)
# What an older plan means by saying nothing.  A plan that says no more than that keeps the digest it had then, because
# artifacts name their plan by it.
_ADDED_IN_2: Final[Mapping[str, Any]] = {"stack": None, "config_changes": ()}
_ADDED_IN_3: Final = ("overlay", "width", "task")
LANGUAGE: Final = "language"  # the task of every measured plan before plans named one


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
        overlay: What is known of the weights the plan changes (:meth:`sglp_deploy.overlay.Overlay.named`), or None.
        width: Kept channels by MLP; None, as no version prunes width yet.
        task: What the layers were measured on ("language"), or None where nothing was measured.
        weights: The overlay itself, where it is at hand; not part of the file.

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
    overlay: Mapping[str, Any] | None = None
    width: Mapping[str, Any] | None = None
    task: str | None = None
    weights: Overlay | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        fault = plan_fault(self)
        if fault:
            raise PlanError(f"the plan contradicts itself; {fault}; make the plan again instead of editing it")

    def to_json(self) -> dict[str, Any]:
        """The content of ``plan.json``: every field as JSON values, with the schema first."""
        return {"schema": SCHEMA} | {name: _io.plain(getattr(self, name)) for name in _field_names()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: If the schema is unknown, or a field is missing, unknown or mistyped.
            PlanError: If the fields contradict each other.
        """
        if value.get("schema") == "plan/1":
            value = {**_ADDED_IN_2, **value, "schema": "plan/2"}
        if value.get("schema") == "plan/2":
            value = {**_added_in_3(value.get("calibration")), **value, "schema": SCHEMA}
        if value.get("schema") != SCHEMA:
            raise ArtifactError(
                f"the plan has schema {value.get('schema')!r}; this version reads {SCHEMA!r}; make the plan again"
            )
        names = set(_field_names())
        given = set(value) - {"schema"}
        if given != names:
            wrong = [f"{name} is missing" for name in sorted(names - given)]
            wrong += [f"{name} is unknown" for name in sorted(given - names)]
            raise ArtifactError(f"the plan's fields are wrong; {', '.join(wrong)}; make the plan again")
        from sglp_deploy.shapes import files  # what checks types loads only where a file is read

        files.refuse_mistyped(files.Plan, value, "the plan", "make the plan again")
        facts = {name: value[name] for name in names}
        for name in ("keep", "drop"):
            facts[name] = tuple(facts[name])
        facts["segments"] = tuple((start, end) for start, end in facts["segments"])
        facts["segment_losses"] = tuple(float(loss) for loss in facts["segment_losses"])
        facts["scores"] = {name: tuple(float(x) for x in row) for name, row in facts["scores"].items()}
        if facts["similarity"] is not None:
            facts["similarity"] = tuple(tuple(float(x) for x in row) for row in facts["similarity"])
            if any(_FARTHEST_CKA < abs(x) < float("inf") for row in facts["similarity"] for x in row):
                raise ArtifactError("a similarity of the plan is far from [0, 1]; no estimator gives it; plan again")
        for name in ("budget", "model", "versions", "elapsed_s", "options"):
            facts[name] = dict(facts[name])
        for name in ("calibration", "compensation", "overlay"):
            facts[name] = None if facts[name] is None else dict(facts[name])
        facts["config_changes"] = tuple(dict(change) for change in facts["config_changes"])
        return cls(**facts)

    def save(self, path: str | Path) -> None:
        """Write ``plan.json`` atomically; the overlay is a file of its own (:meth:`save_overlay`).

        Raises:
            PlanError: If it could not be read back, because a planner or repair recorded what no reader expects.
            StorageError: If it cannot be written; an older file stays as it was.
        """
        value = self.to_json()
        try:
            self.from_json(value)
        except ArtifactError as error:
            raise PlanError(
                f"the plan cannot be written so that it can be read back; {error}; what made it ({self.method}, or its "
                "repair) recorded a fact of another kind; report it to its author"
            ) from error
        _io.write_json(Path(path), value)

    def save_overlay(self, folder: str | Path) -> Path | None:
        """Write ``overlay.safetensors`` into ``folder``, where the plan changes weights; returns its path.

        Raises:
            PlanError: If the plan names an overlay that is not at hand.
            StorageError: If it cannot be written; an older file stays as it was.
        """
        overlay = self.require_weights()
        return None if overlay is None else overlay.save(Path(folder) / OVERLAY_FILE)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan, and find the overlay it names where that lies beside it.

        Raises:
            ArtifactError: If the file is missing, not JSON, of an unknown schema, or malformed.
            PlanError: If the plan contradicts itself.
        """
        file = Path(path)
        plan = cls.from_json(_io.read_json(file, "plan", VERSIONS))
        beside = file.with_name(OVERLAY_FILE)
        return plan.with_weights_from(beside) if plan.overlay is not None and beside.is_file() else plan

    def with_overlay(self, overlay: Overlay) -> PruningPlan:
        """This decision with weights of its own."""
        return replace(self, overlay=overlay.named(), weights=overlay)

    def with_weights_from(self, path: str | Path) -> PruningPlan:
        """This plan with the overlay it names, read from ``path`` when its tensors are first needed.

        Raises:
            PlanError: If the plan names none.
            ArtifactError: If there is no such file.
        """
        if self.overlay is None:
            raise PlanError(f"the plan changes no weights; {path} has nothing to do with it; leave the overlay out")
        return replace(self, weights=Overlay.open(path, self.overlay))

    def require_weights(self) -> Overlay | None:
        """The overlay the plan names, or None where it names none.

        Raises:
            PlanError: If it names one that is not at hand, or another one is.
        """
        if self.overlay is None:
            return None
        named = str(self.overlay.get("digest"))
        if self.weights is None:
            raise PlanError(
                f"the plan changes weights, and their file (digest {named[:12]}) is not at hand; without it the model "
                f"would be another one; put {OVERLAY_FILE} beside the plan, or name it with --overlay"
            )
        if self.weights.digest != named:
            raise PlanError(
                f"the plan names an overlay of digest {named[:12]} and was given one of {self.weights.digest[:12]}; "
                "they belong to different plans; give the one that was made with this plan"
            )
        return self.weights

    def digest(self) -> str:
        """SHA-256 of the plan without its wall times and versions: equal decisions have equal digests."""
        value = {k: v for k, v in self.to_json().items() if k not in ("elapsed_s", "versions")}
        if _says_nothing_but(self, _added_in_3(self.calibration)):
            value = {k: v for k, v in value.items() if k not in _ADDED_IN_3} | {"schema": "plan/2"}
            if _says_nothing_but(self, _ADDED_IN_2):
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
    evidence: Evidence | LayerStats,
    budget: Budget,
    *,
    method: str = "sglp",
    groups: Sequence[Sequence[int]] = (),
    model: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
    task: str = LANGUAGE,
    keep_matrix: bool = True,
    versions: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> PruningPlan:
    """Decide which layers to remove.  Equal input gives an equal plan.

    Args:
        evidence: What the planner may look at: :meth:`sglp_deploy.compressor.Compressor.evidence`, or statistics that
            were taken before.
        budget: How much to remove.
        method: Name of a planner, ours or a third party's (entry-point group ``sglp_deploy.planners``).
        groups: Layers that can only go together (see :func:`sglp_deploy.models.patterns.pattern_groups`), or empty.
        model: ``{"id", "fingerprint", "config_digest", "gguf_file"}`` of the model.
        calibration: Facts of the calibration set, its ``digest`` above all; counts come from the evidence.
        task: What the layers are measured on.
        keep_matrix: Store the similarity matrix in the plan.
        versions: Recorded; this package's, Python's and numpy's when omitted.
        options: For the planner; its ``Options`` say which there are.
        more: Options of the planner as well, for those whose names mean nothing here.

    Raises:
        ConfigError: If a name or an option is unknown; the message has the nearest match and the list.
        PlanError: If the budget cannot be met.
        CalibrationError: If the evidence cannot support a plan.
    """
    chosen = read_options(method, {**(options or {}), **more})
    seen: Evidence = (FixedEvidence(evidence) if isinstance(evidence, LayerStats) else evidence).view(groups)
    decision = checked(planner(method).decide(seen, budget, chosen), seen, budget, method)
    together = {layer for group in groups if set(group) <= set(decision.drop) for layer in group}
    if groups and together != set(decision.drop):
        raise PlanError(
            f"the planner {method!r} removed layers {sorted(set(decision.drop) - together)} alone, whose pattern has "
            "to stay; it does not support preserve_pattern; choose another method"
        )
    record = seen.record()
    plan = PruningPlan(
        method=method,
        n_layers=seen.n_layers,
        keep=kept(seen.n_layers, decision.drop),
        drop=tuple(sorted(decision.drop)),
        segments=decision.segments,
        segment_losses=decision.segment_losses,
        scores=dict(decision.scores),
        similarity=decision.similarity if keep_matrix else None,
        criterion=decision.criterion,
        quota=decision.quota,
        budget=budget.to_json(),
        model=dict(model),
        calibration={**(calibration or {}), **record["counts"]},
        compensation=None,
        seed=seen.seed,
        versions=dict(producer_versions("numpy") if versions is None else versions),
        elapsed_s={"calibration": record["elapsed_s"], **decision.elapsed_s},
        options=recorded_options(method, chosen)
        | {"statistics": dict(record["options"])}
        | ({"groups": [list(group) for group in groups]} if groups else {}),
        task=task,
    )
    if decision.weights is None:
        return plan
    tensors = {str(name): as_tensor(value) for name, value in decision.weights.items()}
    return plan.with_overlay(Overlay(tensors, [{"planner": method, **decision.weights_record}]))


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
        versions=dict(producer_versions("numpy") if versions is None else versions),
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


def _field_names() -> list[str]:
    """The fields that stand in the file."""
    return [item.name for item in fields(PruningPlan) if item.name != "weights"]


def _added_in_3(calibration: Any) -> dict[str, Any]:
    """What a plan/2 means by saying nothing: every measured plan was one of language."""
    return {"overlay": None, "width": None, "task": None if calibration is None else LANGUAGE}


def _says_nothing_but(plan: PruningPlan, meant: Mapping[str, Any]) -> bool:
    return all(getattr(plan, name) == value for name, value in meant.items())
