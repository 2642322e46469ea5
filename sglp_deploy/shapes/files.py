"""Shapes of the plan, the manifest, the certificate, the quality figures and the record of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from sglp_deploy.shapes.strict import Closed, Count, Interval, Number, Positive, Shape, refuse_mistyped

__all__ = ["Artifact", "Certificate", "Plan", "Quality", "Run", "RunStage", "refuse_mistyped"]

Layer = Count
_Segment = Annotated[Sequence[Layer], Field(min_length=2, max_length=2)]


class Losses(Shape):
    """Held-out losses of a repair or a training; None where one was not finite."""

    loss_dense: Number | None = None
    loss_before: Number | None = None
    loss_after: Number | None = None


class _ByShare(Losses):
    source: str


class Step(Losses):
    """One step that made an overlay."""

    repair: str | None = None
    not_done: Sequence[str] = ()
    by_share: Sequence[_ByShare] = ()


class _Refused(Losses):
    repair: str
    why: str


class _Compensation(Shape):
    refused: Sequence[_Refused] = ()


class _Overlay(Shape):
    digest: str
    n_tensors: Count
    bytes: Count
    made_by: Sequence[Step]


class _Model(Shape):
    id: str
    fingerprint: str
    config_digest: str | None = None
    gguf_file: str | None = None
    parameters: Number | None = None


class _Calibration(Shape):
    digest: str | None = None
    source: str | None = None
    n_samples: Count | None = None
    n_tokens: Count | None = None


class _ConfigChange(Shape):
    entry: str
    before: Any
    after: Any
    rule: str


class Plan(Shape):
    """``plan/3``; what must hold between the fields is checked by the plan itself."""

    method: str
    n_layers: Count
    keep: Sequence[Layer]
    drop: Sequence[Layer]
    segments: Sequence[_Segment]
    segment_losses: Sequence[float]
    scores: Mapping[str, Sequence[float]]
    similarity: Sequence[Sequence[float]] | None
    criterion: str | None
    quota: str | None
    budget: Mapping[str, Any]
    model: _Model
    calibration: _Calibration | None
    compensation: _Compensation | None
    seed: int
    versions: Mapping[str, str]
    elapsed_s: Mapping[str, Number]
    options: Mapping[str, Any]
    stack: str | None
    config_changes: Sequence[_ConfigChange]
    overlay: _Overlay | None
    width: Mapping[str, Any] | None
    task: str | None


class _File(Closed):
    sha256: str
    bytes: Count


class _Tensor(Closed):
    name: str
    dtype: str
    shape: Sequence[int | str]


class _ModelBefore(Shape):
    id: str | None = None
    fingerprint: str | None = None


class _Details(Shape):
    interface: str | None = None
    execution: str | None = None
    targets: Sequence[str] = ()
    runner: str | None = None
    executed: bool | None = None


class Artifact(Closed):
    """``artifact/1``."""

    schema_: Literal["artifact/1"] = Field(alias="schema")
    format: str
    files: Mapping[str, _File]
    inputs: Sequence[_Tensor]
    outputs: Sequence[_Tensor]
    precision: str
    weight_bytes: Count
    n_layers: Count
    plan_digest: str
    model: _ModelBefore
    derived_from: str | None
    producer: Mapping[str, str]
    details: _Details


class _Place(Shape):
    row: int | None = None
    phase: str | None = None
    position: int | None = None
    token: int | None = None
    not_finite: str | None = None


class _Departure(Shape):
    row: int
    token: int
    margin: Number


class _Greedy(Shape):
    tokens: Count
    equal_tokens: Count
    departures: Sequence[_Departure]


class _Statistics(Shape):
    cosine_min: Number
    kl_p99: Number | None = None
    kl_max: Number | None = None
    max_abs: Number | None = None
    max_relative: Number | None = None
    top1_stable: Number | None = None
    n_stable: Count | None = None


class _Case(Shape):
    name: str
    passed: bool
    positions: Count
    statistics: _Statistics | None
    worst: _Place
    last_position_max_abs: Number | None = None
    greedy: _Greedy | None = None
    output: str | None = None


class Certificate(Shape):
    """``parity/2``, and ``parity/1``, which had no digest."""

    artifact_digest: str
    format: str
    runner: str
    reference: str
    precision: str
    thresholds: Mapping[str, Number]
    noise_floor: Mapping[str, Number]
    cases: Sequence[_Case]
    reasons: Sequence[str]
    stands_in_for: str = ""


class _Judged(Shape):
    perplexity: Positive | None = None
    nats_per_token: Number | None = None
    nats_by_row: Sequence[Number] | None = None
    predictions_by_row: Sequence[Count] | None = None
    ratio: Positive | None = None
    ratio_interval: Annotated[Sequence[Number | None], Field(min_length=2, max_length=2)] | None = None


class _Figure(Shape):
    value: Number | None = None
    interval: Interval | None = None


class _Metric(Shape):
    label: str
    dense: _Figure
    pruned: _Figure
    difference: Number | None = None
    difference_interval: Interval | None = None


class _Task(Shape):
    kind: str
    source: str
    n_items: Count
    chance: Number | None = None
    metric: str | None = None
    metrics: Mapping[str, _Metric]


class _Written(Shape):
    text: str | None = None
    repetition: Number | None = None


class _Prompt(Shape):
    prompt: str
    dense: _Written
    pruned: _Written


class _Repetition(Shape):
    dense: Number | None = None
    pruned: Number | None = None
    n: Count | None = None


class _Generation(Shape):
    not_made: str | None = None
    decoding: str | None = None
    repetition: _Repetition | None = None
    rows: Sequence[_Prompt] = ()


class Quality(_Judged):
    """``quality/1`` to ``quality/3``."""

    protocol: Mapping[str, str | int | float | None] = {}
    dense: _Judged | None = None
    pruned: _Judged | None = None
    unrepaired: _Judged | None = None
    repaired: _Judged | None = None
    repairs: Sequence[str] = ()
    tasks: Mapping[str, _Task] = {}
    generation: _Generation | None = None


class RunStage(Shape):
    """A stage of ``run.json``."""

    key: str
    state: str
    elapsed_s: Number = 0.0
    outputs: Mapping[str, str] = {}
    product: str = ""
    note: str = ""
    answer: Mapping[str, str | None] = {}


class _Parameters(Shape):
    parameters: Number | None = None
    dense_parameters: Number | None = None


class Run(Shape):
    """``run/1`` and ``run/2``."""

    title: str | None = None
    created: str | None = None
    command: str | None = None
    seed: int | None = None
    stages: Mapping[str, RunStage] = {}
    versions: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    checkpoint: _Parameters | None = None
    accept: Mapping[str, Any] | None = None
