"""Verify: an artifact and the unpruned model in, a certificate with numbers out."""

from __future__ import annotations

from sglp_deploy.parity.bounds import Thresholds, thresholds_for
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.parity.decoder import PromptCase, check_parity, prompt_cases

__all__ = ["ParityReport", "PromptCase", "Thresholds", "check_parity", "prompt_cases", "thresholds_for"]
