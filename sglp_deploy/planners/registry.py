"""Names of planners to objects, and what a user asked of one to its options."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import metadata
from typing import Any, Final, cast, get_args, get_type_hints

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError
from sglp_deploy.planners.seam import Planner

PLANNERS: Final[Mapping[str, str]] = {
    "auto": "sglp_deploy.planners.auto:AutoPlanner",
    "sglp": "sglp_deploy.planners.sglp:SglpPlanner",
}
PLANNER_GROUP: Final = "sglp_deploy.planners"
_RESERVED: Final = ("statistics", "groups")  # keys of a plan's options that are no planner's


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
            _check_shape(made, entry.attr)
            return cast(Planner, made)
        except Exception as error:
            raise ConfigError(
                f"the planner {name!r} ({entry.value}) cannot be loaded; {error}; reinstall or remove that package"
            ) from error
    raise unknown_name("method", name, planner_names())


def read_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of the planner ``name``, checked; what is not given has the planner's default.

    Values may be texts, as a command line has them.

    Raises:
        ConfigError: If the planner or a key is unknown, with the nearest match and the list, or a value does not fit.
    """
    return options_from(planner(name).Options, given, f"planner {name!r}")


def options_from(options: type, given: Mapping[str, Any], owner: str) -> Any:
    """An instance of the dataclass ``options``; what is not given has its default.

    Args:
        options: Each field with a default; its ``__post_init__`` may raise.
        given: Values by field; texts are read as the field's type.
        owner: Whose options they are, for messages ("planner 'sglp'").

    Raises:
        ConfigError: If a key is unknown, with the nearest match and the list, or a value does not fit.
    """
    known = [item.name for item in fields(options)]
    faults: list[str] = []
    values: dict[str, Any] = {}
    hints = get_type_hints(options)
    for key, value in given.items():
        if key not in known:
            faults += (
                unknown_name(f"option of {owner}", key, known).faults
                if known
                else [f"{owner} takes no options; nothing would read {key!r}; leave it out"]
            )
            continue
        try:
            values[key] = _fit(value, hints[key])
        except ValueError:
            faults.append(f"{key}={value!r} does not fit {owner}; {_words(hints[key])} is read; correct the value")
    try:
        made = options(**values)
    except ConfigError as error:
        faults += error.faults
    except (TypeError, ValueError) as error:
        faults.append(f"the {owner} refuses its options; {error}; correct them")
    if faults:
        raise ConfigError(faults)
    return made


def recorded_options(name: str, options: Any) -> dict[str, Any]:
    """The options as a plan records them, as JSON values.

    SGLP's criterion and quota are fields of the plan itself; plans of before had them there alone.
    """
    left_out = ("criterion", "quota") if name == "sglp" else ()
    return {key: _io.plain(value) for key, value in asdict(options).items() if key not in left_out}


def _check_shape(made: Any, what: str) -> None:
    """Refuse a planner whose parts are not what the seam says.

    Raises:
        TypeError: Saying what is missing or wrong.
    """
    if isinstance(made, type) or not isinstance(made, Planner):
        raise TypeError(f"{what} lacks one of name, source, Options, decide")
    options = made.Options
    if not (isinstance(options, type) and is_dataclass(options)):
        raise TypeError(f"Options of {what} is no dataclass")
    for item in fields(options):
        if item.default is MISSING and item.default_factory is MISSING:
            raise TypeError(f"option {item.name} of {what} has no default")
        if item.name in _RESERVED:
            raise TypeError(f"option {item.name} of {what} has a name that plans use for something else")


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; a text is read as that type, "none" as nothing where that is allowed.

    Raises:
        ValueError: If it does not fit, or is a number that no plan can hold.
    """
    from pydantic import TypeAdapter  # here: a plan that is only read does not need it

    kinds = get_args(hint) or (hint,)
    if isinstance(value, str) and value.lower() == "none" and type(None) in kinds:
        return None
    if isinstance(value, bool) and bool not in kinds:
        raise ValueError("true and false are no numbers")  # pydantic would read 1 and 0
    if str in kinds and isinstance(value, int | float) and not set(kinds) & {int, float}:
        value = str(value)
    fitted = TypeAdapter(hint).validate_python(value)
    if isinstance(fitted, float) and not math.isfinite(fitted):
        raise ValueError("not finite")
    return fitted


def _words(hint: Any) -> str:
    return str(getattr(hint, "__name__", None) or hint).replace("None", "nothing")
