"""Processes of ours that start processes of their own: ended as a whole, and never outliving us.

A child leads a group of its own.  It watches its standard input, a pipe that closes when we end
(:mod:`sglp_deploy.isolation.worker_side.parent_watch`), and then ends the group itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
