"""Names of planners to objects, and what a user asked of one to its options."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any, Final, cast, get_type_hints

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError
from sglp_deploy.planners.seam import Planner

PLANNERS: Final[Mapping[str, str]] = {"sglp": "sglp_deploy.planners.sglp:SglpPlanner"}
PLANNER_GROUP: Final = "sglp_deploy.planners"


def planner_names() -> list[str]:
    """Names there are: ours and those of installed third parties."""
    return sorted({*PLANNERS, *(entry.name for entry in metadata.entry_points(group=PLANNER_GROUP))})


def planner(name: str) -> Planner:
    """The planner of that name; a third party's never replaces one of ours.

    Raises:
        ConfigError: If there is none, or it cannot be loaded or lacks a part of :class:`Planner`.
    """
    if name in PLANNERS:
        module, _, attribute = PLANNERS[name].partition(":")
        return cast(Planner, getattr(importlib.import_module(module), attribute)())
    for entry in metadata.entry_points(group=PLANNER_GROUP, name=name):
        try:
            made = entry.load()
            made = made() if isinstance(made, type) else made
            if not isinstance(made, Planner):
                raise TypeError(f"{entry.attr} lacks one of name, source, Options, decide")
        except Exception as error:
            raise ConfigError(
                f"the planner {name!r} ({entry.value}) cannot be loaded; {error}; reinstall or remove that package"
            ) from error
        return made
    raise unknown_name("method", name, planner_names())


def read_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of the planner ``name``, checked; what is not given has the planner's default.

    Values may be texts, as a command line has them.

    Raises:
        ConfigError: If the planner or a key is unknown, with the nearest match and the list, or a value does not fit.
    """
    options = planner(name).Options
    known = [item.name for item in fields(options)]
    faults: list[str] = []
    values: dict[str, Any] = {}
    hints = get_type_hints(options)
    for key, value in given.items():
        if key not in known:
            faults += (
                unknown_name(f"option of planner {name!r}", key, known).faults
                if known
                else [f"planner {name!r} takes no options; nothing would read {key!r}; leave it out"]
            )
            continue
        try:
            values[key] = _fit(value, hints[key])
        except ValueError:
            faults.append(
                f"{key}={value!r} does not fit planner {name!r}; {_words(hints[key])} is read; correct the value"
            )
    try:
        made = options(**values)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    return made


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; a text is read as that type.

    Raises:
        ValueError: If it does not fit.
    """
    from pydantic import TypeAdapter  # here: a plan that is only read does not need it

    return TypeAdapter(hint).validate_python(value)


def _words(hint: Any) -> str:
    return str(getattr(hint, "__name__", None) or hint).replace("None", "nothing")
