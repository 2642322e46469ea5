"""SGLP: cut the layers where their similarity changes, then drop the least important ones inside the segments."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Final

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError, PlanError
from sglp_deploy.importance import CRITERIA, PROBE_OF, ImportanceScores, score
from sglp_deploy.planners.budget import QUOTAS, Budget, resolve_drops
from sglp_deploy.planners.seam import Evidence, LayerDecision
from sglp_deploy.segmentation import PROFILES, Segmentation, choose_n_segments, fisher_segmentation, loss_curve
from sglp_deploy.similarity import ESTIMATORS, SimilarityMatrix


@dataclass(frozen=True)
class SglpOptions:
    """What a caller may ask of SGLP.

    Attributes:
        criterion: Layer score: "grad-norm", "grad-norm-weight-sum", "grad-norm-output", "block-influence", "taylor".
        n_segments: K; when omitted, the least K that explains 95 % of the profile, as far as the budget allows.
        profile: What is cut into segments: "row_sum" or "rows" of the similarity matrix.
        estimator: CKA estimator: "unbiased", "biased" or "mean_of_ratios".
        quota: How removals are shared between segments: "proportional" or "global".

    Raises:
        ConfigError: If a name is unknown or K is not positive.
    """

    criterion: str = "grad-norm"
    n_segments: int | None = None
    profile: str = "row_sum"
    estimator: str = "unbiased"
    quota: str = "proportional"

    def __post_init__(self) -> None:
        faults: list[str] = []
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                faults += unknown_name(name, value, choices).faults
        if self.n_segments is not None and self.n_segments < 1:
            faults.append(f"n_segments={self.n_segments} is too small; nothing could be computed; pass 1 or more")
        if faults:
            raise ConfigError(faults)


_CHOICES: Final = {
    "criterion": tuple(CRITERIA),
    "profile": PROFILES,
    "estimator": tuple(ESTIMATORS),
    "quota": QUOTAS,
}


class SglpPlanner:
    """CKA, Fisher segmentation, layer scores, removal in rank order with a survivor in every segment.

    Source:
        Li, Lu et al., SGLP, arXiv:2410.14720.  What its abstract leaves open is decided in ``docs/method.md``.
    """

    name = "sglp"
    source = "Li, Lu et al., SGLP, arXiv:2410.14720"
    Options = SglpOptions

    def decide(self, evidence: Evidence, budget: Budget, options: SglpOptions) -> LayerDecision:
        """See :class:`sglp_deploy.planners.seam.Planner`.

        With ``options.n_segments`` omitted, K is the least that leaves 5 % of the profile unexplained, then lowered as
        far as the budget needs; a K given by the caller is kept, and a budget it does not allow is an error.
        """
        stats = evidence.measured("cka", PROBE_OF[options.criterion])
        started = perf_counter()
        similarity = SimilarityMatrix.from_stats(stats, options.estimator)
        compared = perf_counter()
        scores = score(stats, options.criterion)
        ranked = perf_counter()
        segmentation, drops = _segment_and_drop(similarity, scores, evidence, budget, options)
        decided = perf_counter()
        return LayerDecision(
            drop=drops,
            segments=segmentation.segments,
            segment_losses=segmentation.losses,
            criterion=scores.criterion,
            scores={scores.criterion: tuple(scores.values.tolist())},
            quota=options.quota,
            similarity=tuple(tuple(row) for row in similarity.values.tolist()),
            elapsed_s={
                "similarity": compared - started,
                "importance": ranked - compared,
                "segmentation": decided - ranked,
            },
        )


def _segment_and_drop(
    similarity: SimilarityMatrix,
    scores: ImportanceScores,
    evidence: Evidence,
    budget: Budget,
    options: SglpOptions,
) -> tuple[Segmentation, tuple[int, ...]]:
    """The segments, and the layers that go by them; a K that is not given is lowered until the budget fits."""

    def drops(segments: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        return resolve_drops(scores.values, segments, evidence, budget, options.quota)

    if options.n_segments is not None:
        segmentation = fisher_segmentation(similarity, options.n_segments, kind=options.profile)
        return segmentation, drops(segmentation.segments)
    n_segments = choose_n_segments(loss_curve(similarity, kind=options.profile), limit=evidence.n_layers)
    # Step down to a K that fits.  No formula gives it: keep >= K is enough only when every layer may go and the budget
    # counts layers.
    while True:
        segmentation = fisher_segmentation(similarity, n_segments, kind=options.profile)
        try:
            return segmentation, drops(segmentation.segments)
        except PlanError:
            if n_segments == 1:
                raise
        n_segments -= 1


def segments_of(evidence: Evidence) -> tuple[tuple[int, int], ...]:
    """The segments SGLP finds with its defaults, for planners that only want a survivor in each."""
    similarity = SimilarityMatrix.from_stats(evidence.measured("cka"), SglpOptions.estimator)
    n_segments = choose_n_segments(loss_curve(similarity, kind=SglpOptions.profile), limit=evidence.n_layers)
    return fisher_segmentation(similarity, n_segments, kind=SglpOptions.profile).segments
