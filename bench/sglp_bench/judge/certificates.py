"""No certificate, no speed number: which certificate stands behind an arm, and the refusal where none does.

A certificate belongs to an artifact by digest, never by name or place.  ``sglp-deploy verify`` leaves it in the
artifact's folder.  ``sglp-deploy run`` leaves it in the run's folder ``parity``.  Both are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BenchmarkError
from sglp_deploy.parity.certificate import ParityReport

CERTIFICATE = "parity.json"  # in the artifact's folder; no file of the artifact, so its digest stays


@dataclass(frozen=True)
class Certification:
    """What is known about the parity of one arm.

    Attributes:
        state: "passed", "failed" or "missing".
        reason: Why it is not "passed"; empty when it is.
        runner: What ran the artifact when it was certified; empty when it never was.
    """

    state: str
    reason: str = ""
    runner: str = ""

    @property
    def passed(self) -> bool:
        """Whether the arm's times are times of the right model."""
        return self.state == "passed"

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)


def certification(artifact: ExportArtifact, given: Iterable[ParityReport] = ()) -> Certification:
    """The certificate of ``artifact``: among ``given``, in its folder, or in the run folder it lies in.

    Where several belong to it, one that failed decides.
    """
    reports, faults = list(given), []
    for file in certificate_files(artifact.path):
        try:
            reports.append(ParityReport.load(file))
        except ArtifactError as error:
            faults.append(str(error))
    mine = [report for report in reports if report.artifact_digest == artifact.digest]
    for report in mine:
        if not report.passed:
            first = report.reasons[0] if report.reasons else "no case passed"
            return Certification("failed", f"its certificate failed: {first}", report.runner)
    # A manifest of something not executed yet names what stands in for it; on the device another thing is timed.
    stand_in = artifact.details.get("runner") if artifact.details.get("executed") is False else None
    if ran := [report for report in mine if report.runner != stand_in and not report.stands_in_for]:
        return Certification("passed", runner=ran[-1].runner)
    if mine:
        runner = mine[-1].runner
        where = "with --device cuda" if stand_in else f"again where {artifact.format} itself runs"
        return Certification("missing", f"its certificate is of a stand-in ({runner}); verify {where}", runner)
    if faults:
        return Certification("missing", f"its certificate cannot be read: {faults[0]}")
    if reports:
        other = reports[-1].artifact_digest
        return Certification(
            "missing", f"its certificate is of another artifact: digest {other[:12]} and not {artifact.digest[:12]}"
        )
    return Certification("missing", "it has no certificate")


def certificate_files(folder: Path) -> list[Path]:
    """The files that can hold the certificate of the artifact in ``folder`` and exist."""
    folder = folder.resolve()
    places = [folder / CERTIFICATE]
    if folder.parent.name == "artifacts":
        places.append(folder.parents[1] / "parity" / f"{folder.name}.json")
    elif folder.name == "checkpoint":
        places.append(folder.parent / "parity" / "torch.json")
    return [place for place in places if place.is_file()]


def require_certificates(
    arms: Mapping[str, ExportArtifact], given: Iterable[ParityReport] = (), *, unverified: bool = False
) -> dict[str, Certification]:
    """Label to certification, refused when one arm has not passed.

    Args:
        arms: Label to artifact.
        given: Certificates beside those on disk.
        unverified: Refuse nothing; what is missing is then part of the result.

    Raises:
        BenchmarkError: If an arm has no certificate, a failed one, or one of another artifact.
    """
    given = list(given)
    found = {label: certification(artifact, given) for label, artifact in arms.items()}
    for label, state in found.items():
        if not (state.passed or unverified):
            path = arms[label].path
            raise BenchmarkError(
                f"{path} (arm {label!r}) is not certified, {state.reason}; the speed of an artifact that may compute "
                f"something else is no speed; run 'sglp-deploy verify {path}', or pass --unverified "
                "(unverified=True in Python) to measure it all the same"
            )
    return found


def unverified_note(label: str, artifact: Mapping[str, Any]) -> str | None:
    """The sentence about an arm whose certificate is known not to have passed, or None.

    Args:
        label: The arm.
        artifact: :attr:`sglp_bench.result.ArmResult.artifact`.
    """
    certificate = artifact.get("certificate") or {}
    if certificate.get("state", "passed") == "passed":
        return None
    return f"UNVERIFIED: {label} was measured although {certificate.get('reason') or 'it has no certificate'}"
