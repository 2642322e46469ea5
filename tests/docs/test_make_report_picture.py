"""The README's picture: made from a run folder by one command, small, and refused where there is nothing to show."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from report_fixtures import write_run_folder

ROOT = Path(__file__).parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make(folder: Path, picture: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | changes
    command = [sys.executable, "docs/pictures/make_report_picture.py", str(folder), "--to", str(picture)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG."""
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_committed_picture_is_small_enough_for_a_readme() -> None:
    picture = ROOT / "docs" / "pictures" / "report.png"
    assert picture.stat().st_size <= 200_000
    width, height = size_of(picture)
    assert width == 1200
    assert 1000 < height < 2400


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_a_run_folder_becomes_a_picture_unless_it_would_be_too_large(tmp_path: Path) -> None:
    write_run_folder(tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    picture = tmp_path / "report.png"
    done = make(tmp_path / "run", picture)
    assert sorted((tmp_path / "run").rglob("*")) == before
    if find_spec("PIL"):
        assert done.returncode == 0, done.stderr
        assert size_of(picture)[0] == 1200
        assert picture.stat().st_size <= 200_000
    else:  # this page has 256 kB in all its colours
        assert done.returncode == 1
        assert "bytes; at most 200000 are wanted; install Pillow" in done.stderr
        assert not picture.exists()


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on PATH")
def test_a_folder_without_a_plan_gives_no_picture(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = make(tmp_path / "run", tmp_path / "report.png")
    assert done.returncode == 1
    assert "the report shows no plan; its folder holds no plan.json; name the folder of a finished run" in done.stderr
    assert not (tmp_path / "report.png").exists()


def test_without_a_browser_the_script_says_what_to_install(tmp_path: Path) -> None:
    write_run_folder(tmp_path / "run")
    done = make(tmp_path / "run", tmp_path / "report.png", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "no browser was found; the picture is a screenshot; install chromium" in done.stderr
