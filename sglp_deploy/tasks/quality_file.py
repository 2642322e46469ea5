"""``quality.json`` read strictly: every figure that a report or a verdict quotes has the type it was written with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError
from sglp_deploy.tasks.base import QUALITY_VERSIONS

_Positive = Annotated[FiniteFloat, Field(gt=0)]
_Interval = Annotated[list[FiniteFloat | None], Field(min_length=2, max_length=2)] | None


class _Read(BaseModel):
    """What is not quoted may be anything: a third party's task writes figures of its own."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Read):
    perplexity: _Positive | None = None
    nats_per_token: FiniteFloat | None = None
    nats_by_row: list[FiniteFloat] | None = None
    predictions_by_row: list[int] | None = None
    ratio: _Positive | None = None
    ratio_interval: _Interval = None


class _Figure(_Read):
    value: FiniteFloat | None = None
    interval: _Interval = None


class _Metric(_Read):
    label: str
    dense: _Figure
    pruned: _Figure
    difference: FiniteFloat | None = None
    difference_interval: _Interval = None


class _Task(_Read):
    kind: str
    source: str
    n_items: int
    chance: FiniteFloat | None = None
    metrics: dict[str, _Metric]


class _Written(_Read):
    text: str | None = None
    repetition: FiniteFloat | None = None


class _Row(_Read):
    prompt: str
    dense: _Written
    pruned: _Written


class _Repetition(_Read):
    dense: FiniteFloat | None = None
    pruned: FiniteFloat | None = None
    n: int | None = None


class _Generation(_Read):
    not_made: str | None = None
    decoding: str | None = None
    repetition: _Repetition = _Repetition()
    rows: list[_Row] = []


class _Quality(_Model):
    protocol: dict[str, str | int | float | None] = {}
    dense: _Model | None = None
    pruned: _Model | None = None
    unrepaired: _Model | None = None
    repaired: _Model | None = None
    repairs: list[str] = []
    tasks: dict[str, _Task] = {}
    generation: _Generation | None = None


def read_quality(file: Path) -> dict[str, Any]:
    """The content of a ``quality.json`` of any version, checked.

    Raises:
        ArtifactError: If it cannot be read, or a figure is of another kind than is written.
    """
    value = _io.read_json(file, "quality", QUALITY_VERSIONS)
    try:
        _Quality.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{file} is not as it is written; {place}: {first['msg']}; judge the models again"
        ) from None
    return value
