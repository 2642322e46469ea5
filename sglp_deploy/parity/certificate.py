"""The parity certificate: what was measured, what passes, and the verdict that follows from the two.

Measuring is :mod:`sglp_deploy.parity`; here is everything that can be read, judged and written without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, ConfigError, ParityError

SCHEMA = "parity/1"  # history: 1 = first

# A reference that disagrees with itself this much more than a bound is broken (its cache, for one) and must not talk
# the bound up until anything passes.
_MOST_LOOSENING = 100.0


@dataclass(frozen=True)
class Thresholds:
    """What passes.  Chosen by element type; see :func:`thresholds_for`.

    Attributes:
        margin: Reference's gap between its best two logits above which a position counts as stable.
        top1_stable: Least share of stable positions whose best token agrees.
        kl_p99: Greatest 99th percentile of KL(reference || artifact), nats.
        kl_max: Greatest KL of any position, nats; one wrong position in 160 is invisible to a percentile.
        max_abs: Greatest difference of any logit; one wrong word in 50,000 is invisible to KL and cosine.
        noise_factor: The bounds on KL and logits are at least this many times the reference's own noise floor (and at
            most 100 times themselves).
        cosine_min: Least cosine between the two logit vectors of any position.
    """

    margin: float
    top1_stable: float
    kl_p99: float
    kl_max: float
    max_abs: float
    noise_factor: float
    cosine_min: float


def thresholds_for(precision: str) -> Thresholds:
    """Bounds for weights of "fp32", "fp16", "bf16", "int8" or "int4"; torch's names of the first three do as well.

    The near-tie margins (0.01, 0.1, 0.5) are those of ONNX Runtime mobius' parity ladder.  The float32 bounds lie
    about 7 times above the most that ONNX Runtime was seen to differ by, because another processor rounds otherwise.
    Damage listed above the bound can therefore pass; damage below it is refused.  KL p99 in nats, greatest logit
    difference, the most seen of noise and the least seen of damage:

    ======================================  ===================  ===================
    float32, CPU                            SmolLM2-135M         tiny random models
    ======================================  ===================  ===================
    reference against itself                8e-11, 7e-5          2e-12, 6e-6
    ONNX Runtime against PyTorch            1.4e-9, 5e-4         4e-12, 1e-5
    one weight matrix rounded to float16    3e-9, 5e-4           5e-10, 1e-4
    one *element* of one norm times 1.01    1e-8, 1.1e-3         3e-9, 3e-4
    **bound**                               **1e-8, 3e-3**       **1e-8, 3e-3**
    one weight matrix rounded to bfloat16   4e-7, 7e-3           2e-8, 7e-4
    one norm times 1.01                     5e-5, 8e-2           6e-8, 1.2e-3
    ======================================  ===================  ===================

    Weights of int8 and int4 are compared with the model they were rounded from, so the bounds say what rounding may
    cost and can refuse only what costs more.  The worst position of SmolLM2-135M through ONNX Runtime GenAI (blocks of
    32 weights), and the least of damage to the reference:

    ======================================  =================================  ===============================
    KL p99, KL, logit, cosine, stable top1  int8                               int4
    ======================================  =================================  ===============================
    rounding alone, 30 layers               0.030, 0.05, 1.7, 0.987, 1.0       1.9, 2.6, 16, -0.003, 0.72
    rounding alone, 24 layers as planned    0.078, 0.53, 9.1, 0.87, 1.0        7.0, 9.8, 47, -0.92, 0.36
    **bound**                               **0.15, 1, 15, 0.8, 0.97**         **3, 5, 25, none, 0.6**
    layers 14 and 15 swapped                0.22, 0.40, 4.7, 0.90, 0.99        2.0, 2.1, 13, 0.43, 0.76
    attention of layer 15 switched off      0.26, 0.36, 6.9, 0.84, 0.98        2.1, 2.6, 13, 0.35, 0.81
    layer 22 switched off                   1.5, 3.7, 12, 0.60, 0.88           2.4, 3.4, 17, 0.69, 0.74
    layer 8 missing                         9.8, 12, 42, -0.93, 0.70           8.6, 12, 43, -0.94, 0.61
    ======================================  =================================  ===============================

    So int4 of so small a model hides a fault within a layer; its certificate says no more than that it is this model
    with these layers, and the one of the same plan in float32 says that the graph is right.  int4 of the pruned model
    fails, and should: in one case it chooses another token at 64 % of the positions where the model is sure.  Cosine
    is not judged there: rounding moves all logits of a position together, which changes no probability.

    The int8 bounds rest on this one model and were set after its planned depth had been seen: under those first
    chosen (0.1, 0.2, 4, 0.95 for KL p99, KL, logit, cosine) it failed, and all four were then widened.  The same model
    with layers 20 to 25 removed by hand comes to KL p99 0.36 and logit 13, which is outside both.

    Those of bfloat16 are not calibrated on real runs yet; those of float16 only on weights rounded to it and computed
    with in float32 (OpenVINO, SmolLM2-135M: KL p99 1.5e-5, logits 0.04).

    Raises:
        ConfigError: If no bounds are known for ``precision``.
    """
    if precision in ("float32", "fp32"):
        return Thresholds(0.01, 1.0, kl_p99=1e-8, kl_max=1e-7, max_abs=3e-3, noise_factor=10.0, cosine_min=0.99999)
    if precision in ("float16", "fp16"):
        return Thresholds(0.1, 0.995, kl_p99=1e-3, kl_max=1e-2, max_abs=0.5, noise_factor=3.0, cosine_min=0.999)
    if precision == "int8":
        return Thresholds(0.5, 0.97, kl_p99=0.15, kl_max=1.0, max_abs=15.0, noise_factor=3.0, cosine_min=0.8)
    if precision == "int4":
        return Thresholds(0.5, 0.6, kl_p99=3.0, kl_max=5.0, max_abs=25.0, noise_factor=3.0, cosine_min=-1.0)
    if precision in ("bfloat16", "bf16"):
        return Thresholds(0.5, 0.995, kl_p99=1e-2, kl_max=1e-1, max_abs=4.0, noise_factor=3.0, cosine_min=0.99)
    raise _no_bounds(precision, "fp32, fp16, bf16, int8 and int4")


@dataclass(frozen=True)
class ForwardThresholds:
    """What passes for a graph that runs forward only; see :func:`forward_thresholds_for`.

    Attributes:
        margin: Reference's gap between its best two logits above which a position counts as stable.
        top1_stable: Least share of stable positions whose best class agrees.
        kl_p99: Greatest 99th percentile of KL(reference || artifact), nats; for logits only.
        kl_max: Greatest KL of any position, nats; for logits only.
        max_relative: Greatest difference of any value, in units of the reference's root mean square over the case: the
            size of a hidden state is a family's own affair.
        noise_factor: The bounds on KL and values are at least this many times the reference's own noise floor (and at
            most 100 times themselves).
        cosine_min: Least cosine between the two vectors of any position.
    """

    margin: float
    top1_stable: float
    kl_p99: float
    kl_max: float
    max_relative: float
    noise_factor: float
    cosine_min: float


def forward_thresholds_for(precision: str) -> ForwardThresholds:
    """Bounds for weights of "fp32", "fp16" or "bf16"; torch's names of them do as well.

    Calibrated on the tiny random models of every family in the test suite.  The float32 bounds lie about 5 times above
    the most that was seen of noise, because real models are deeper and other processors round otherwise.  Damage
    listed above the bound can therefore pass; damage below it is refused.  Greatest difference relative to the
    reference's root mean square, and KL p99 in nats; the most seen of noise and the least seen of damage:

    ===================================================  =======================
    float32, CPU                                         29 families
    ===================================================  =======================
    reference against itself                             8.5e-6, 3.2e-12
    ONNX Runtime against PyTorch                         5.9e-5, 9.0e-12
    one weight matrix in the middle rounded to float16   5.5e-6, 2.1e-12
    one weight matrix in the middle rounded to bfloat16  3.3e-5, 2.0e-10
    one *element* of one norm times 1.01                 1.1e-4, 2.6e-12
    **bound**                                            **3e-4, 1e-8**
    one norm times 1.01                                  1.2e-3, 3.4e-10
    ===================================================  =======================

    Those of float16 and bfloat16 are not calibrated on real runs yet.

    Raises:
        ConfigError: If no bounds are known for ``precision``.
    """
    if precision in ("float32", "fp32"):
        return ForwardThresholds(
            0.01, 1.0, kl_p99=1e-8, kl_max=1e-7, max_relative=3e-4, noise_factor=10.0, cosine_min=0.99999
        )
    if precision in ("float16", "fp16"):
        return ForwardThresholds(
            0.1, 0.995, kl_p99=1e-3, kl_max=1e-2, max_relative=0.1, noise_factor=3.0, cosine_min=0.999
        )
    if precision in ("bfloat16", "bf16"):
        return ForwardThresholds(
            0.5, 0.995, kl_p99=1e-2, kl_max=1e-1, max_relative=0.5, noise_factor=3.0, cosine_min=0.99
        )
    raise _no_bounds(precision, "fp32, fp16 and bf16")


def _no_bounds(precision: str, known: str) -> ConfigError:
    return ConfigError(
        f"no bounds are known by which to certify weights of {precision!r}; they are known for {known}; export it in "
        "one of these, or pass thresholds of your own to check_parity"
    )


def limits(bounds: Thresholds | ForwardThresholds, noise_floor: Mapping[str, float]) -> dict[str, float]:
    """The bounds on what the noise floor names (KL, greatest difference) that are in force over it."""
    return {
        name: min(max(bound, bounds.noise_factor * noise_floor[name]), _MOST_LOOSENING * bound)
        for name, bound in asdict(bounds).items()
        if name in noise_floor
    }


def judge_case(record: Mapping[str, Any], in_force: Mapping[str, float], bounds: Thresholds) -> list[str]:
    """What is wrong with a measured case, in words; nothing when it passes.

    Args:
        record: One entry of :attr:`ParityReport.cases`.
        in_force: From :func:`limits`.
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
        in_force: From :func:`limits`.
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
        value = asdict(self)
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            **value,
            "cases": list(value["cases"]),
            "reasons": list(value["reasons"]),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParityReport:
        """Inverse of :meth:`to_json`; ``passed`` is worked out again and not believed.

        Raises:
            ArtifactError: If the schema is unknown, or a field is missing, unknown or mistyped.
        """
        if value.get("schema") != SCHEMA:
            raise ArtifactError(
                f"the certificate has schema {value.get('schema')!r}; this version reads {SCHEMA!r}; verify again"
            )
        names = set(cls.__dataclass_fields__)
        given = set(value) - {"schema", "passed"}
        # Certificates from before there was the last field stay readable.
        faults = [f"{name} is missing" for name in sorted(names - given - {"stands_in_for"})]
        faults += [f"{name} is unknown" for name in sorted(given - names)]
        faults += [
            f"{name} is not {words}"
            for name in sorted(names & given)
            for kind, words in [_FIELD_KINDS.get(name, (str, "text"))]
            if not isinstance(value[name], kind)
        ]
        if not faults:
            faults += [
                f"case {number} lacks a name, or passed is not true or false"
                for number, case in enumerate(value["cases"])
                if not (isinstance(case, Mapping) and "name" in case and isinstance(case.get("passed"), bool))
            ]
            faults += ["reasons are not all text"] * (not all(isinstance(reason, str) for reason in value["reasons"]))
        try:
            if not faults:
                facts = {name: value[name] for name in names & given}
                return cls(**{**facts, "cases": tuple(facts["cases"]), "reasons": tuple(facts["reasons"])})
        except ValueError as error:  # NaN, which Python's reader of JSON lets through
            faults.append(str(error))
        raise ArtifactError(f"the certificate is malformed; {', '.join(faults)}; verify the artifact again")

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
        return cls.from_json(_io.read_json(Path(path), "parity"))

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


_FIELD_KINDS: Mapping[str, tuple[type, str]] = {
    "thresholds": (Mapping, "a table"),
    "noise_floor": (Mapping, "a table"),
    "cases": (list, "a list"),
    "reasons": (list, "a list"),
}
