"""Certificates of fewer prompts and steps, for tests of something else that need a real one.

What a user gets (32 steps after each of three prompts and a batch) is checked by ``tests/parity/test_parity.py`` and,
from end to end, by ``tests/core/test_compressor.py`` and ``tests/cli/test_cli.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from sglp_deploy.parity import ParityReport, check_parity
from sglp_deploy.parity import decoder as parity
from sglp_deploy.parity import verify as verification


def fewer_steps(patch: pytest.MonkeyPatch, *, steps: int = 2, prompts: tuple[int, ...] = (9,)) -> None:
    """The same comparison in a fraction of the time: one prompt and the batch, two decoding steps each."""

    def shorter(*given: Any, **named: Any) -> ParityReport:
        return check_parity(*given, **named, decode_steps=steps)

    patch.setattr(verification, "check_parity", shorter)
    patch.setattr(parity, "PROMPT_TOKENS", prompts)
