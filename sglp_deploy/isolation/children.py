"""Processes of ours that start processes of their own: ended as a whole, and never outliving us.

A child leads a group of its own.  It watches its standard input, a pipe that closes when we end
(:mod:`sglp_deploy.isolation.worker_side.parent_watch`), and then ends the group itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglp_deploy.isolation.worker_side.parent_watch import VARIABLE

_WATCH = Path(__file__).with_name("worker_side") / "parent_watch.py"

WATCHED = {VARIABLE: "1"}  # to be added to the environment of a child that watches


def watched(command: list[str]) -> list[str]:
    """``command`` run by a process that ends it, and its children, when whoever holds its standard input is gone.

    Its environment needs :data:`WATCHED`.
    """
    return [sys.executable, "-P", str(_WATCH), *command]


def run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; neither a signal to us nor our end leaves it running.

    Args:
        command: Given no input.
        environment: This process's own when omitted.
        timeout_s: It and its children are killed after this long.

    Raises:
        subprocess.TimeoutExpired: If it takes longer.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            watched(list(command)),
            stdin=subprocess.PIPE,  # nothing is written; it closes when we end
            stdout=out,
            stderr=err,
            env={**(os.environ if environment is None else environment), **WATCHED},
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        finally:
            end_group(process)
            assert process.stdin is not None
            process.stdin.close()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(command), status, out.read(), err.read())


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and the group; nothing when it has ended by itself.

    A leader that was killed may have left its group behind.
    """
    status = process.poll()
    if status is not None and status >= 0:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
