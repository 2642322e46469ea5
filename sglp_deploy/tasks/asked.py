"""What a user asks models to be judged by: requests in, tasks that are read and checked out.

A request is ``KIND:WHAT``, for example ``last-word:passages.txt``.  A path alone means multiple choice.  Nothing here
imports torch, so a wrong file is refused before a model is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from sglp_deploy._names import unknown_name
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.documents import lines_of, read_text

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress
    from sglp_deploy.tasks.scores import Scores

CHOICE: Final = "choice"
LM_EVAL: Final = "lm-eval"

# Kind to what reads it: (what, limit) -> JudgedTask.
KINDS: Final[Mapping[str, str]] = {
    CHOICE: "sglp_deploy.tasks.multiple_choice:MultipleChoice.read",
    "last-word": "sglp_deploy.tasks.last_word:LastWord.read",
    LM_EVAL: "sglp_deploy.tasks.lm_harness:HarnessTask.read",
}


class JudgedTask(Protocol):
    """Items with right answers, by which a model is judged."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def scores(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Scores:
        """What ``module`` gets.

        Raises:
            UnsupportedModelError: If it is no decoder language model.
            ConfigError: If an item does not fit it.
        """
        ...


def read_tasks(requests: Sequence[str], *, limit: int | None = None) -> tuple[JudgedTask, ...]:
    """The tasks that ``requests`` name, with the first ``limit`` items of each (all when None).

    Raises:
        ConfigError: If a kind is unknown, a file is missing or wrong, or two tasks have one name; all are listed.
        MissingDependencyError: If lm-eval is asked for and not installed.
    """
    faults: list[str] = []
    found: dict[str, JudgedTask] = {}
    for request in requests:
        try:
            kind, what = split(request)
            module, _, path = KINDS[kind].partition(":")
            read: Any = importlib.import_module(module)
            for attribute in path.split("."):
                read = getattr(read, attribute)
            made = cast("Callable[[str, int | None], JudgedTask]", read)(what, limit)
        except ConfigError as error:
            faults += error.faults
            continue
        if made.name in found:
            faults.append(
                f"two tasks are called {made.name!r}; a report could not tell them apart; rename the file of one"
            )
        found[made.name] = made
    if faults:
        raise ConfigError(faults)
    return tuple(found.values())


def split(request: str) -> tuple[str, str]:
    """Kind and file (or name) of a request.

    Raises:
        ConfigError: If the kind is unknown or nothing follows it.
    """
    kind, separator, what = request.partition(":")
    # A path may hold a colon, on Windows in its second place.
    if not separator or Path(request).exists() or len(kind) == 1:
        kind, what = CHOICE, request
    if kind not in KINDS:
        raise unknown_name("kind of task", kind, KINDS)
    if not what:
        raise ConfigError(f"{request!r} names no task; nothing could be judged; write {kind}:FILE")
    return kind, what


def file_of(request: str) -> str:
    """The file or name behind a request, whatever its kind."""
    try:
        return split(request)[1]
    except ConfigError:  # said where the tasks are read
        return request


def name_of(request: str) -> str:
    """What reports and limits call a task."""
    what = file_of(request)
    return what if request.startswith(f"{LM_EVAL}:") and not is_task_file(what) else Path(what).stem


def is_task_file(what: str) -> bool:
    """Whether what stands behind ``lm-eval:`` is the file of a task and not the name of one."""
    return what.endswith((".yaml", ".yml"))


def needs_connection(request: str) -> bool:
    """Whether its data may have to be downloaded."""
    return request.startswith(f"{LM_EVAL}:") and not is_task_file(request)


def read_lines(path: str) -> list[tuple[int, str]]:
    """Lines of a task's file that hold something, with their numbers.

    Raises:
        ConfigError: If it is missing, unreadable, not UTF-8 or empty.
    """
    lines = lines_of(read_text(path, "task file"))
    if not lines:
        raise ConfigError(f"task file {path} is empty; there is nothing to judge by; one item a line is read")
    return lines
