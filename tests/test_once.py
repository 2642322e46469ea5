"""What the tests share between their processes is made by the first that asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from once import once


def test_two_that_ask_together_get_what_one_of_them_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    start = Barrier(2)

    def make(folder: Path) -> None:
        folder.mkdir()  # fails where another one is making it
        (folder / "file").write_text("whole")

    def ask(worker: str) -> str:
        factory: Any = SimpleNamespace(getbasetemp=lambda: tmp_path / worker)
        start.wait(timeout=60)
        return (once(factory, "dear/thing", make) / "file").read_text()

    # Each opens the lock's file for itself, as two processes do.
    with ThreadPoolExecutor(2) as askers:
        assert list(askers.map(ask, ("popen-gw0", "popen-gw1"))) == ["whole", "whole"]
    assert (tmp_path / "dear" / "thing" / "file").exists()


def test_what_failed_half_way_is_made_again(tmp_path: Path) -> None:
    factory: Any = SimpleNamespace(getbasetemp=lambda: tmp_path / "base")

    def fail(folder: Path) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        once(factory, "thing", fail)
    made: list[Path] = []
    assert once(factory, "thing", made.append) == once(factory, "thing", made.append)
    assert len(made) == 1
