"""Which texts are mixed where the user names none; read without torch."""

from __future__ import annotations

from typing import Final

from sglp_deploy.evidence.text import BUILTIN, CalibrationSet

GENERAL: Final = "general"  # what comes with a package
WRITTEN: Final = "written"  # what the unpruned model writes itself

Part = CalibrationSet | str


def default_parts(calibration: CalibrationSet, *, tokenizer: bool = True) -> tuple[Part, ...]:
    """The plan's calibration text and three others.

    Args:
        calibration: The plan's text.
        tokenizer: Whether the model has one; without it, only token ids can be used.
    """
    if not tokenizer:
        return (calibration, WRITTEN)
    own = () if calibration.source.startswith(BUILTIN) else (calibration,)
    return (*own, BUILTIN, GENERAL, WRITTEN)
