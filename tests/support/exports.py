"""Pruned models and the artifacts made of them, as the fixtures of ``tests/exporters`` hand them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tiny
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.materialize import CompressedModel, materialize
from sglp_exporters.onnx import layer_template


@dataclass
class Exported:
    """One family: the models, their artifacts, and how often anything was traced to make them."""

    models: dict[str, CompressedModel]
    artifacts: dict[str, ExportArtifact]
    traces: int
    template: layer_template.LayerTemplate


def compressed(family: str, keep: tuple[int, ...] | None = None, **options: Any) -> CompressedModel:
    loaded = tiny.loaded(family, **options)
    kept = keep if keep is not None else tuple(range(loaded.module.config.num_hidden_layers))
    return materialize(loaded.module, tiny.plan_for(loaded.module, kept), loaded.source, tokenizer=loaded.tokenizer)
