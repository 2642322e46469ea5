"""Names of repairs to objects."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, cast

from sglp_deploy._names import unknown_name
from sglp_deploy.planners.registry import options_from
from sglp_deploy.repairs.options import OPTIONS
from sglp_deploy.repairs.seam import Repair

REPAIRS: Final[Mapping[str, str]] = {
    "refit": "sglp_deploy.repairs.refit:Refit",
    "local": "sglp_deploy.repairs.local:Local",
    "linear": "sglp_deploy.repairs.linear:Linear",
    "scale": "sglp_deploy.repairs.scale:Scale",
}


def repair(name: str) -> Repair:
    """The repair of that name.

    Raises:
        ConfigError: If there is none; the message has the nearest match and the list.
    """
    if name not in REPAIRS:
        raise unknown_name("repair", name, REPAIRS)
    module, _, attribute = REPAIRS[name].partition(":")
    return cast(Repair, getattr(importlib.import_module(module), attribute)())


def read_options(name: str, given: Mapping[str, Any]) -> Any:
    """The options of the repair ``name``, checked; what is not given has the repair's default.

    Raises:
        ConfigError: If the repair or a key is unknown, with the nearest match and the list, or a value does not fit.
    """
    if name not in OPTIONS:
        raise unknown_name("repair", name, REPAIRS)
    return options_from(OPTIONS[name], given, f"repair {name!r}")
