"""The exit codes of the command line, and nothing else; ``docs/cli.md`` says the same to users."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    PARITY = 3
    INCOMPARABLE = 4
    LIMIT = 5
    INTERRUPTED = 130
