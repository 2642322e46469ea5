"""Every example runs as a reader would run it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/[0-9]*.py"))


def test_there_are_examples_and_their_numbers_are_distinct() -> None:
    assert EXAMPLES
    numbers = [example.name[:2] for example in EXAMPLES]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_the_example_runs(example: Path, tmp_path: Path) -> None:
    # The source roots as pytest has them, so that it also runs where the package is not installed.
    paths = [str(ROOT / part) for part in (".", "exporters", "bench")]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    finished = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip()
    # What the example made is gone.  torch leaves a folder for compiled kernels where no process before it has chosen
    # one.
    assert [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor_")] == []
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
