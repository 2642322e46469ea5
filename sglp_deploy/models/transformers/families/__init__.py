"""Declared facts by ``model_type``; a family stands here once the tests have pruned, reloaded and run it."""

from __future__ import annotations

from collections.abc import Mapping

from sglp_deploy.models.transformers.families import decoders, encoders, vision
from sglp_deploy.models.transformers.families.base import Family

FAMILIES: Mapping[str, Family] = {**decoders.FAMILIES, **encoders.FAMILIES, **vision.FAMILIES}

__all__ = ["FAMILIES", "Family"]
