"""A file's shape as types, and the check that everything read from the file has them.

A reader that tests whether a field is there, and not what it is, ends where the field is used, in words of Python.  So
every field that any code of ours reads stands in a shape, however deep it lies.  What no code reads may be anything: a
third party's planner, task or exporter writes facts of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from sglp_deploy.errors import ArtifactError

Count = Annotated[int, Field(ge=0)]
Number = FiniteFloat
Positive = Annotated[FiniteFloat, Field(gt=0)]
Interval = Annotated[list[Number] | tuple[Number, Number], Field(min_length=2, max_length=2)]


class Shape(BaseModel):
    """An object of a file; no text is taken for a number, and no truth value either."""

    model_config = ConfigDict(extra="allow", strict=True)


class Closed(Shape):
    """An object whose digest covers what is read of it: a field that nobody reads would escape it."""

    model_config = ConfigDict(extra="forbid", strict=True)


def refuse_mistyped(shape: type[Shape], value: Any, what: str, then: str) -> None:
    """Check ``value`` against its shape.

    Args:
        shape: What it must be.
        value: As a JSON reader gives it.
        what: Of what it is the content ("the plan").
        then: What a user does about a damaged one ("make the plan again").

    Raises:
        ArtifactError: Naming the first field that is missing or of another type.
    """
    try:
        shape.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise ArtifactError(f"{what} lacks or mistypes a field; {_fault(error)}; {then}") from None


def _fault(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deep"
    first: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"])) or "its content"
    if first["type"] == "missing":
        return f"{place} is missing"
    given = repr(first["input"])
    return f"{place} is {given if len(given) <= 60 else given[:57] + '...'}: {first['msg']}"
