"""The parity certificate: what was measured, what passes, and the verdict that follows from the two.

Measuring is :mod:`sglp_deploy.parity.decoder` and :mod:`sglp_deploy.parity.forward`, and what passes stands in
:mod:`sglp_deploy.parity.bounds`.  Here is everything that can be read, judged and written without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, ParityError
from sglp_deploy.parity.bounds import ForwardThresholds, Thresholds, limits

SCHEMA = "parity/2"  # history: 1 = first; 2 = a digest of itself
VERSIONS = (1, 2)  # those that are read


def judge_case(record: Mapping[str, Any], in_force: Mapping[str, float], bounds: Thresholds) -> list[str]:
    """What is wrong with a measured case, in words; nothing when it passes.

    Args:
        record: One entry of :attr:`ParityReport.cases`.
        in_force: From :func:`sglp_deploy.parity.bounds.limits`.
        bounds: What passes.
    """
    statistics, worst, greedy = record["statistics"], record["worst"], record["greedy"]
    place = f"row {worst['row']}, {worst['phase']} position {worst['position']}"
    if statistics is None:
        return [f"NaN or Inf in the logits of the {worst['not_finite']} at {place}"]
    faults = []
    for name, words, unit in (("kl_p99", "KL p99", " nats"), ("kl_max", "KL", " nats"), ("max_abs", "a logit", "")):
        if not statistics[name] <= in_force[name]:
            verb = "differs by" if name == "max_abs" else "is"
            faults.append(f"{words} {verb} {statistics[name]:.3g}, above {in_force[name]:.3g}{unit} (worst at {place})")
    if not statistics["cosine_min"] >= bounds.cosine_min:
        faults.append(f"cosine {statistics['cosine_min']:.6f} is below {bounds.cosine_min} (worst at {place})")
    stable = statistics["top1_stable"]
    if stable is not None and stable < bounds.top1_stable:
        faults.append(f"{1 - stable:.1%} of {statistics['n_stable']} stable positions choose another token")
    spread = record["last_position_max_abs"]
    if spread is None:
        faults.append("NaN or Inf in the artifact's logits while it decoded freely")
    elif spread > in_force["max_abs"]:
        # A graph that gives other logits when asked for the last position only would pass all of the above.
        faults.append(f"asked for the last position only, the artifact differs from itself by {spread:.3g}")
    # Free-running tokens must follow the reference up to its first near-tie; after one they may part.
    faults += [
        f"free-running greedy leaves the reference at token {place['token']} of row {place['row']}, where the "
        f"reference is sure by {place['margin']:.3g}"
        for place in greedy["departures"]
        if place["margin"] > bounds.margin and bounds.top1_stable == 1.0
    ]
    return faults


def judge_forward_case(
    record: Mapping[str, Any], in_force: Mapping[str, float], bounds: ForwardThresholds
) -> list[str]:
    """What is wrong with a measured case of a forward-only artifact, in words; nothing when it passes.

    Args:
        record: One entry of :attr:`ParityReport.cases`.
        in_force: From :func:`sglp_deploy.parity.bounds.limits`.
        bounds: What passes.
    """
    statistics, worst, output = record["statistics"], record["worst"], record["output"]
    place = f"row {worst['row']}, position {worst['position']}"
    if statistics is None:
        return [f"NaN or Inf in the {output} of the {worst['not_finite']} at {place}"]
    faults = []
    if not statistics["max_relative"] <= in_force["max_relative"]:
        faults.append(
            f"a value of {output} differs by {statistics['max_relative']:.3g} of their size, above "
            f"{in_force['max_relative']:.3g} (worst at {place})"
        )
    for name, words in (("kl_p99", "KL p99"), ("kl_max", "KL")):
        if name in statistics and not statistics[name] <= in_force[name]:
            faults.append(f"{words} is {statistics[name]:.3g}, above {in_force[name]:.3g} nats (worst at {place})")
    if not statistics["cosine_min"] >= bounds.cosine_min:
        faults.append(f"cosine {statistics['cosine_min']:.6f} is below {bounds.cosine_min} (worst at {place})")
    stable = statistics.get("top1_stable")
    if stable is not None and stable < bounds.top1_stable:
        faults.append(f"{1 - stable:.1%} of {statistics['n_stable']} stable positions choose another class")
    return faults


@dataclass(frozen=True)
class ParityReport:
    """The certificate; ``passed`` is True only if every case passed.

    Attributes:
        artifact_digest: Which artifact.
        format: Its exporter.
        runner: What executed it.
        reference: What it was compared with.
        precision: Element type of the weights.
        thresholds: The bounds in force.
        noise_floor: The reference against itself in another batch shape: ``max_abs``, ``kl_p99``, ``kl_max``, each the
            greatest of all cases.
        cases: One mapping for each case: name, passed, positions, statistics (None when a logit was not finite),
            worst, last_position_max_abs, greedy; the last two are None for an artifact that runs forward only, whose
            cases also name the output.
        reasons: Why it failed; empty when it passed.
        stands_in_for: The format whose own runtime was not what ran; empty when it was.

    Raises:
        ValueError: If a number is NaN or infinite, or a value is not JSON.
    """

    artifact_digest: str
    format: str
    runner: str
    reference: str
    precision: str
    thresholds: Mapping[str, float]
    noise_floor: Mapping[str, float]
    cases: tuple[Mapping[str, Any], ...]
    reasons: tuple[str, ...] = field(default=())
    stands_in_for: str = ""

    def __post_init__(self) -> None:
        _io.canonical_json(asdict(self))  # refuses NaN and infinity: a certificate that cannot be written is none

    @property
    def passed(self) -> bool:
        """Whether the artifact is certified."""
        return not self.reasons and bool(self.cases) and all(case["passed"] is True for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """The content of ``parity.json``."""
        value = {"schema": SCHEMA, "passed": self.passed, **asdict(self)}
        value |= {"cases": list(self.cases), "reasons": list(self.reasons)}
        return {**value, "digest": _io.sha256_json(value)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParityReport:
        """Inverse of :meth:`to_json`; no verdict in it is believed: each case is judged again by its statistics.

        Raises:
            ArtifactError: If the schema is unknown, a field is missing, unknown or mistyped, a case that is said to
                have passed does not, or the content is not what was written.
        """
        if value.get("schema") not in [f"parity/{version}" for version in VERSIONS]:
            raise ArtifactError(
                f"the certificate has schema {value.get('schema')!r}; this version reads {SCHEMA!r}; verify again"
            )
        digested = value["schema"] != "parity/1"
        names = set(cls.__dataclass_fields__)
        given = set(value) - {"schema", "passed"} - ({"digest"} if digested else set())
        # Certificates from before there was the last field stay readable.
        faults = [f"{name} is missing" for name in sorted(names - given - {"stands_in_for"})]
        faults += [f"{name} is unknown" for name in sorted(given - names)]
        if faults:
            raise ArtifactError(f"the certificate is malformed; {', '.join(faults)}; verify the artifact again")
        from sglp_deploy.shapes import files  # what checks types loads only where a file is read

        files.refuse_mistyped(files.Certificate, value, "the certificate", "verify the artifact again")
        facts = {name: value[name] for name in names & given}
        try:
            report = cls(**{**facts, "cases": tuple(facts["cases"]), "reasons": tuple(facts["reasons"])})
        except ValueError as error:  # NaN where nobody reads, which Python's reader of JSON lets through
            raise ArtifactError(f"the certificate is malformed; {error}; verify the artifact again") from None
        if fault := report._contradiction():
            raise ArtifactError(f"the certificate contradicts itself; {fault}; verify the artifact again")
        if digested and value.get("digest") != _io.sha256_json({k: v for k, v in value.items() if k != "digest"}):
            raise ArtifactError(
                "the certificate is not as it was written; its digest is of another content; verify the artifact again"
            )
        return report

    def _contradiction(self) -> str | None:
        """By what a case fails that is said to have passed, judged again from its statistics; or None."""
        forward = "max_relative" in self.thresholds
        kind: type[Thresholds] | type[ForwardThresholds] = ForwardThresholds if forward else Thresholds
        over_noise = {"max_relative" if forward else "max_abs", "kl_p99", "kl_max"}
        if set(self.thresholds) != {entry.name for entry in fields(kind)} or set(self.noise_floor) != over_noise:
            return "it lacks bounds or the noise they are over"
        bounds = kind(**self.thresholds)
        in_force = limits(bounds, self.noise_floor)
        for case in self.cases:
            if case["passed"]:
                try:
                    if isinstance(bounds, ForwardThresholds):
                        faults = judge_forward_case(case, in_force, bounds)
                    else:
                        faults = judge_case(case, in_force, bounds)
                except (KeyError, TypeError) as error:  # a statistic that is absent, or None
                    faults = [f"what it was judged by is incomplete ({error})"]
                if faults:
                    return f"{case['name']!r} is said to have passed, and {faults[0]}"
        return None

    def save(self, path: str | Path) -> None:
        """Write ``parity.json`` atomically.

        Raises:
            StorageError: If it cannot be written; an older file stays as it was.
        """
        _io.write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> ParityReport:
        """Read a certificate.

        Raises:
            ArtifactError: If the file is missing, not JSON, of an unknown schema, or malformed.
        """
        return cls.from_json(_io.read_json(Path(path), "parity", VERSIONS))

    def require(self) -> None:
        """Raise unless the artifact passed.

        Raises:
            ParityError: Names the first reason and carries this report.
        """
        if not self.passed:
            first = self.reasons[0] if self.reasons else "no case passed"
            raise ParityError(
                f"the {self.format} artifact does not match its reference; {first}; do not deploy it, export it "
                "again and keep parity.json for a bug report",
                self,
            )
