"""Pruned models, the artifacts made of them as the fixtures of ``tests/exporters`` hand them out, and shared traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tiny
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.materialize import CompressedModel, materialize
from sglp_exporters.onnx.layer_template import LayerTemplate

if TYPE_CHECKING:
    import pytest
    from transformers import PreTrainedModel

# Tracing takes seconds, and one trace serves any weights.
_KEPT: list[LayerTemplate] = []


@dataclass
class Exported:
    """One family: the models, their artifacts, and how often anything was traced to make them."""

    models: dict[str, CompressedModel]
    artifacts: dict[str, ExportArtifact]
    traces: int
    template: LayerTemplate


def compressed(family: str, keep: tuple[int, ...] | None = None, **options: Any) -> CompressedModel:
    loaded = tiny.loaded(family, **options)
    kept = keep if keep is not None else tuple(range(loaded.module.config.num_hidden_layers))
    return materialize(loaded.module, tiny.plan_for(loaded.module, kept), loaded.source, tokenizer=loaded.tokenizer)


def keep_trace(template: LayerTemplate) -> None:
    """Let the tests that come later in this process use a trace that was made right."""
    _KEPT.append(template)


def share_traces(patch: pytest.MonkeyPatch) -> None:
    """While ``patch`` is in force, trace nothing that an earlier test of this process has traced.

    Not for a test of tracing itself, and not while something wrong is planted: what is traced meanwhile is kept.
    """
    trace = LayerTemplate.trace

    def kept(module: PreTrainedModel) -> LayerTemplate:
        found = next((template for template in _KEPT if template.covers(module)), None)
        if found is None:
            found = trace(module)
            keep_trace(found)
        return found

    patch.setattr(LayerTemplate, "trace", kept)
