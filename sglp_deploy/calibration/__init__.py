"""The name that :mod:`sglp_deploy.evidence.text` had in 0.1; kept so that code written for it still runs."""

from sglp_deploy.evidence.text import CalibrationSet, TokenBatches

__all__ = ["CalibrationSet", "TokenBatches"]
