"""SGLP: cut the layers where their similarity changes, then drop the least important ones inside the segments."""

from __future__ import annotations

from time import perf_counter

from sglp_deploy.errors import PlanError
from sglp_deploy.evidence.statistics import LayerStats
from sglp_deploy.importance import ImportanceScores, score
from sglp_deploy.plan import Budget, LayerDecision, PlannerOptions, resolve_drops
from sglp_deploy.segmentation import Segmentation, choose_n_segments, fisher_segmentation, loss_curve
from sglp_deploy.similarity import SimilarityMatrix


def plan_layers(stats: LayerStats, budget: Budget, options: PlannerOptions) -> LayerDecision:
    """CKA, Fisher segmentation, layer scores, removal in rank order with a survivor in every segment.

    With ``options.n_segments`` omitted, K is the least that leaves 5 % of the profile unexplained, then lowered as far
    as the budget needs; a K given by the caller is kept, and a budget it does not allow is an error.

    Raises:
        PlanError: If the budget cannot be met.
        CalibrationError: If a layer is constant over the calibration set.
        ConfigError: If an option has an unknown value.

    Source:
        Li, Lu et al., SGLP, arXiv:2410.14720.  What its abstract leaves open is decided in ``docs/method.md``.
    """
    started = perf_counter()
    similarity = SimilarityMatrix.from_stats(stats, options.estimator)
    compared = perf_counter()
    scores = score(stats, options.criterion)
    ranked = perf_counter()
    segmentation, drops = _segment_and_drop(similarity, scores, stats, budget, options)
    decided = perf_counter()
    return LayerDecision(
        drop=drops,
        segments=segmentation.segments,
        segment_losses=segmentation.losses,
        criterion=scores.criterion,
        scores={scores.criterion: tuple(scores.values.tolist())},
        quota=options.quota,
        similarity=tuple(tuple(row) for row in similarity.values.tolist()),
        elapsed_s={"similarity": compared - started, "importance": ranked - compared, "segmentation": decided - ranked},
    )


def _segment_and_drop(
    similarity: SimilarityMatrix,
    scores: ImportanceScores,
    stats: LayerStats,
    budget: Budget,
    options: PlannerOptions,
) -> tuple[Segmentation, tuple[int, ...]]:
    """The segments, and the layers that go by them; a K that is not given is lowered until the budget fits."""

    def drops(segments: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
        return resolve_drops(scores.values, segments, stats, budget, options.quota, options.groups)

    if options.n_segments is not None:
        segmentation = fisher_segmentation(similarity, options.n_segments, kind=options.profile)
        return segmentation, resolve_drops(
            scores.values, segmentation.segments, stats, budget, options.quota, options.groups
        )
    n_segments = choose_n_segments(loss_curve(similarity, kind=options.profile), limit=stats.n_layers)
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
