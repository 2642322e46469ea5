"""Names a user types: one wording for the unknown ones, and what may be the name of a model on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from sglp_deploy.errors import ConfigError

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and newline

_TILDE = re.compile(r"(^|[=:,])(~[\w.-]*)(?=$|[/\\,])")


def at_home(words: str) -> str:
    """``words`` with the home folder for each "~" that begins a path: at the start, or behind "=", ":" or ","."""
    return _TILDE.sub(lambda found: found[1] + os.path.expanduser(found[2]), words)


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for ``name`` where one of ``known`` was expected; ``kind`` is what it names ("criterion")."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}? the choices are" if close else "choose one of"
    return ConfigError(f"unknown {kind} {name!r}; nothing is registered under that name; {advice} {', '.join(names)}")


PRECISIONS: Final = ("auto", "fp32", "bf16")
"""What a caller may have matrices multiplied in; "auto" is bf16 where the processor has instructions for it."""


def precision_faults(asked: str) -> list[str]:
    """What is wrong with an option ``precision``; empty where nothing is."""
    return [] if asked in PRECISIONS else list(unknown_name("precision", asked, PRECISIONS).faults)


def may_be_hub_id(model: str) -> bool:
    """Whether ``model``, which is no file or folder here, can be meant as "name" or "owner/name" on the hub."""
    return not (
        Path(model).is_absolute() or model.startswith((".", "~")) or model.endswith(".gguf") or model.count("/") > 1
    )


def printable(text: str) -> str:
    """``text`` without what moves a terminal's cursor, changes its colours or turns letters round.

    Names come from other people's files.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
