"""Every case through both sides, and a certificate of what was measured: what decoders and forward passes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from sglp_deploy.errors import BackendError, SGLPError
from sglp_deploy.parity.bounds import Bounds, limits
from sglp_deploy.parity.certificate import ParityReport

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact

Case = TypeVar("Case")
Result = TypeVar("Result")


def certify(
    artifact: ExportArtifact,
    cases: Sequence[Case],
    measure: Callable[[Case], tuple[dict[str, Any], Mapping[str, Any]]],
    judge: Callable[[Mapping[str, Any], Mapping[str, float], Bounds], list[str]],
    bounds: Bounds,
    *,
    over_noise: Sequence[str],
    runner_name: str,
    reference_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Measure every case, then judge all of them over the greatest noise of any.

    Args:
        artifact: What is certified.
        cases: What both sides are given.
        measure: Returns one entry of :attr:`ParityReport.cases`, not yet judged, and the statistics of the reference
            against itself, which are empty where it returned no number.
        judge: Says in words what is wrong with a record, given the bounds in force and the bounds.
        bounds: What passes.
        over_noise: Names of the statistics whose bounds give way to the noise floor.
        runner_name: What executed the artifact.
        reference_name: What it is compared with.
        progress: Called with (cases done, cases in all).
    """
    records: list[dict[str, Any]] = []
    floor = dict.fromkeys(over_noise, 0.0)
    for done, case in enumerate(cases):
        record, noise = measure(case)
        records.append(record)
        floor = {name: max(value, noise.get(name, 0.0)) for name, value in floor.items()}
        if progress is not None:
            progress(done + 1, len(cases))
    # Only now: the noise floor is the greatest of all cases, because a short prompt often shows none.
    in_force = limits(bounds, floor)
    reasons = []
    for record in records:
        faults = judge(record, in_force, bounds)
        record["passed"] = not faults
        reasons += [f"{record['name']}: {fault}" for fault in faults]
    return ParityReport(
        artifact_digest=artifact.digest,
        format=artifact.format,
        runner=runner_name,
        reference=reference_name,
        precision=artifact.precision,
        thresholds=asdict(bounds),
        noise_floor=floor,
        cases=tuple(records),
        reasons=tuple(reasons),
    )


def run_side(who: str, case: str, call: Callable[..., Result], *inputs: Any, **options: Any) -> Result:
    """What ``call`` returns; its failure carries the side's name and the case's.

    Raises:
        BackendError: If it fails in words that are not ours.
    """
    try:
        return call(*inputs, **options)
    except SGLPError:
        raise
    except Exception as error:
        raise BackendError(
            f"{who} failed on {case}; {type(error).__name__}: {error}; export the artifact again, and report this if "
            "it stays"
        ) from error
