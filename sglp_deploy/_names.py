"""One wording for a name nobody knows: the nearest match and the whole list, so a typing error costs one reading."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from sglp_deploy.errors import ConfigError


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for ``name`` where one of ``known`` was expected; ``kind`` is what it names ("criterion")."""
    names = sorted(known)
    close = get_close_matches(str(name), names, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}? the choices are" if close else "choose one of"
    return ConfigError(f"unknown {kind} {name!r}; nothing is registered under that name; {advice} {', '.join(names)}")
