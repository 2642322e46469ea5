"""Shapes of a benchmark's files: the raw result, the comparison, and the report made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from sglp_deploy.shapes.strict import Count, Number, Shape, refuse_mistyped

__all__ = ["Comparison", "Report", "Result", "Shape", "refuse_mistyped"]


# What can be drawn and added up; a stall in one of two pairs makes an interval of many powers of ten.
_Ratio = Annotated[Number, Field(gt=1e-60, lt=1e60)]
_Share = Annotated[Number, Field(gt=-1e60, lt=1e60)]
_Level = Annotated[Number, Field(gt=0, lt=1e18)]  # seconds, tokens a second, bytes
_Ratios = Annotated[Sequence[_Ratio], Field(min_length=2, max_length=2)]


class _Reading(Shape):
    probe: str
    bytes: Count | None
    note: str | None


class _Certification(Shape):
    state: str
    reason: str = ""
    runner: str = ""


class _Artifact(Shape):
    """What is said of an arm's artifact; ``null`` where it is not known."""

    digest: str | None = None
    format: str | None = None
    precision: str | None = None
    n_layers: Count | None = None
    weight_bytes: Count | None = None
    artifact_bytes: Count | None = None
    plan_digest: str | None = None
    model_id: str | None = None
    model_fingerprint: str | None = None
    certificate: _Certification | None = None


class _MeasuredArtifact(_Artifact):
    """What results are compared by is always there."""

    format: str
    precision: str
    model_fingerprint: str | None
    weight_bytes: Count
    artifact_bytes: Count


class _Environment(Shape):
    cpu_model: str | None = None
    gpus: Sequence[str] | None = None
    cpus_usable: Count | None = None


class _Moment(Shape):
    load_average_1min: Number | None = None


class _Conditions(Shape):
    start: _Moment | None = None
    end: _Moment | None = None


class _Block(Shape):
    index: Count
    cycle: Count
    half: Count
    load_s: Number
    samples: Mapping[str, Any]  # the workload's own, which reads and checks them
    warm_up: Mapping[str, Any]
    conditions: _Conditions


class _MeasuredArm(Shape):
    artifact: _MeasuredArtifact
    blocks: Sequence[_Block]
    memory: Mapping[str, _Reading]


class Result(Shape):
    """``result/2``, and ``result/1``, which had no device and no power."""

    workload: Mapping[str, Any]
    device: str = "here"
    power: Mapping[str, Any] | None = None
    baseline: str
    control: str | None
    vocab_size: Count | None
    environment: _Environment
    arms: Mapping[str, _MeasuredArm]


class _Control(Shape):
    ratio: _Ratio
    interval: _Ratios | None
    noise_floor: _Share | None


class _Percentile(Shape):
    value: _Level | None
    reason: str | None


class _Metric(Shape):
    metric: str
    formula: str
    baseline: _Level
    candidate: _Level
    ratio: _Ratio
    interval: _Ratios | None
    verdict: str
    words: str
    bootstrap_interval: _Ratios | None
    p_value: _Share | None
    pair_ratios: Sequence[_Ratio]
    control: _Control | None
    resolved: bool | None
    percentiles: Mapping[str, Mapping[str, _Percentile]]
    ceiling: _Share | None
    fraction_of_ceiling: _Share | None
    gain_fraction: _Share | None


class _ComparedArm(Shape):
    artifact: _Artifact
    memory: Mapping[str, _Reading]


class Comparison(Shape):
    """``comparison/2``, and ``comparison/1``, which had no device."""

    baseline: str
    candidate: str
    control: str | None
    paired: bool
    n_pairs: Count
    workload: Mapping[str, Any]
    device: str = "here"
    environment: _Environment
    arms: Mapping[str, _ComparedArm]
    metrics: Mapping[str, _Metric]
    notes: Sequence[str]


class _Card(Shape):
    label: str
    value: str
    detail: str


class _Finding(Shape):
    met: bool
    sentence: str


class _Accept(Shape):
    findings: Sequence[_Finding]


class Report(Shape):
    """``report/1``; its page is made when the report is, so only what is read again is checked."""

    title: str
    artifacts: Sequence[Mapping[str, Any]]
    parity: Sequence[Mapping[str, Any]]
    measurements: Sequence[Mapping[str, Any]]
    claims: Sequence[Mapping[str, Any]]
    cards: Sequence[_Card]
    missing: Sequence[str]
    accept: _Accept | None = None
