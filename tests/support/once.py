"""What is dear to make and never changed, made once for a whole run of the tests, by whichever process asks first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name``, filled by ``make``; the same one in every process of pytest-xdist.

    A process that asks while another one makes it waits.  What fails half-way is made again by the next that asks.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker's folder lies in the one of the whole run
        base = base.parent
    folder = base / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f"{folder.name}.made")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not made.exists():
            make(folder)
            made.touch()
    return folder
