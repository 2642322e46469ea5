"""Damaged files, drawn from a seed: one place of a sound file changed, or its bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

_ODD: tuple[Any, ...] = (
    *({}, [], None, "", "x", "\x1b[31m", "../../etc/passwd", True, False, 0, -1, 1, 2**63, 10**30, 1.5, -0.0, 1e308),
    *([[]], [None], {"a": 1}, [1, 2, 3], {"": None}, "é" * 300, "9" * 400),
)
# Texts in the place of a value, which JSON writers never write.
_RAW = ("NaN", "-Infinity", '"\\ud800"', "1" * 5000, "[" * 5000 + "]" * 5000, "1e999", "{", "")
_HERE = "@here@"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield value, key
        yield from _places(item)


def _changed(rng: random.Random, text: str) -> str:
    value = copy.deepcopy(json.loads(text))
    places = list(_places(value))
    if not places:
        return ""
    container, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[key] = _HERE
            return json.dumps(value).replace(json.dumps(_HERE), rng.choice(_RAW))
        case 2:
            other, there = rng.choice(places)
            container[key] = copy.deepcopy(other[there])
        case 3 if isinstance(container, dict):
            container[rng.choice(("more", "schema", str(key).upper()))] = rng.choice(_ODD)
        case 4 if isinstance(container[key], (int, float)):
            number = container[key]
            container[key] = rng.choice((-1, 0, number + 1, number * 1000, 10**400, str(number)))
        case _:
            container[key] = rng.choice(_ODD)
    return json.dumps(value)


def text_damaged(seed: int, text: str) -> str:
    """``text``, of any kind, with the damage of that number: cut, doubled, or one letter more."""
    return _letters_changed(random.Random(seed), text)


def bytes_damaged(seed: int, content: bytes) -> bytes:
    """``content`` with the damage of that number: cut, doubled, bytes exchanged or put in; most near the start."""
    rng = random.Random(seed)
    near = rng.random() < 0.6
    at = rng.randrange((min(len(content), 2048) if near else len(content)) + 1)
    put = rng.choice((b"\x00", b"\xff" * 8, b"{", b'"', (2**63).to_bytes(8, "little"), b"\xef\xbb\xbf", b"9" * 40))
    return rng.choice(
        (
            content[:at],
            content[at:],
            content[:at] + put + content[at:],
            content[:at] + put + content[at + len(put) :],
            content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
            if at < len(content)
            else content + content,
            b"",
        )
    )


def _letters_changed(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text[:at],
            text[at:],
            text[:at] + rng.choice('{}[]",:0-e\x00\ufeff') + text[at:],
            text[: at // 2] + text[at:],
        )
    )


def damaged(seed: int, text: str) -> str:
    """``text``, JSON of ours, with the damage of that number."""
    rng = random.Random(seed)
    how: Callable[[random.Random, str], str] = _letters_changed if rng.random() < 0.15 else _changed
    return how(rng, text)
