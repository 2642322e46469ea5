"""A model and data of its kind in, a loss, rows for CKA and a quality figure out.

A task is one file with one class.  Its name stands in :data:`TASKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

    from sglp_deploy.tasks.base import Task

TASKS: Final[Mapping[str, str]] = {"language": "sglp_deploy.tasks.language:LanguageTask"}


def task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ConfigError: If there is none; the message has the nearest match and the list.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    module, _, attribute = TASKS[name].partition(":")
    return cast("Task", getattr(importlib.import_module(module), attribute)())


def task_of(module: nn.Module) -> Task:
    """The first task that fits ``module``.

    Raises:
        UnsupportedModelError: If none does, with the reasons and what to do without measuring.
    """
    reasons = []
    for name in TASKS:
        found = task(name)
        reason = found.refusal(module)
        if reason is None:
            return found
        reasons.append(reason)
    raise _unmeasurable(module, reasons)


def require(wanted: Task, module: nn.Module) -> None:
    """Refuse a model that is not of the task ``wanted``.

    Raises:
        UnsupportedModelError: Saying how to plan without measuring.
    """
    reason = wanted.refusal(module)
    if reason is not None:
        raise _unmeasurable(module, [reason])


def _unmeasurable(module: nn.Module, reasons: Sequence[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} {' and '.join(reasons)}; planning and judging by measurement are for decoder "
        "language models; name the layers yourself: plan MODEL --drop-layers 2,5 (Compressor.plan_by_hand)"
    )
