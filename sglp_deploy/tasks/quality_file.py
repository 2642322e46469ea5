"""``quality.json`` read strictly: every figure that a report or a verdict quotes has the type it was written with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglp_deploy import _io
from sglp_deploy.shapes import files
from sglp_deploy.tasks.base import QUALITY_VERSIONS


def read_quality(file: Path) -> dict[str, Any]:
    """The content of a ``quality.json`` of any version, checked.

    Raises:
        ArtifactError: If it cannot be read, or a figure is of another kind than is written.
    """
    value = _io.read_json(file, "quality", QUALITY_VERSIONS)
    files.refuse_mistyped(files.Quality, value, str(file), "judge the models again")
    return value
