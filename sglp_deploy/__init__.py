"""Make a trained model shallower and ship it: plan, materialize, export, verify.

Names are loaded on first use (PEP 562).  Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# The runtimes that this package loads, here and in its workers, report their use to nobody unless the user says so.
for _name in ("ORT_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")

_HOME = {
    "Budget": "sglp_deploy.plan",
    "CalibrationSet": "sglp_deploy.evidence.text",
    "CompressedModel": "sglp_deploy.materialize",
    "Compressor": "sglp_deploy.compressor",
    "ExportArtifact": "sglp_deploy.artifact",
    "LayerStats": "sglp_deploy.evidence.statistics",
    "ParityReport": "sglp_deploy.parity",
    "PruningPlan": "sglp_deploy.plan",
    "SGLPError": "sglp_deploy.errors",
    "Segmentation": "sglp_deploy.segmentation",
    "SimilarityMatrix": "sglp_deploy.similarity",
}

__all__ = [
    "Budget",
    "CalibrationSet",
    "CompressedModel",
    "Compressor",
    "ExportArtifact",
    "LayerStats",
    "ParityReport",
    "PruningPlan",
    "SGLPError",
    "Segmentation",
    "SimilarityMatrix",
    "__version__",
]

if TYPE_CHECKING:
    from sglp_deploy.artifact import ExportArtifact
    from sglp_deploy.compressor import Compressor
    from sglp_deploy.errors import SGLPError
    from sglp_deploy.evidence.statistics import LayerStats
    from sglp_deploy.evidence.text import CalibrationSet
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity import ParityReport
    from sglp_deploy.plan import Budget, PruningPlan
    from sglp_deploy.segmentation import Segmentation
    from sglp_deploy.similarity import SimilarityMatrix


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
