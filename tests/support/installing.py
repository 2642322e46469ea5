"""Installing a package of somebody else for a test, as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def pip_install(package: Path, site: Path) -> None:
    """Install without a connection, with nothing but what is here already."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(package)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
