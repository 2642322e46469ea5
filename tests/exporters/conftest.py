"""Artifacts that many tests read.  A trace takes seconds, so each family is traced once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tiny
from exports import Exported, compressed, keep_trace
from sglp_exporters.onnx import layer_template
from sglp_exporters.onnx.exporter import OnnxExporter


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Exported]]:
    """Baseline, pruned ("pruned") and a baseline of other weights ("other") of a family, by its name."""
    made: list[int] = []
    trace = layer_template.trace_decoder

    def counted(module: Any) -> Any:
        made.append(1)
        return trace(module)

    @cache
    def of(family: str) -> Exported:
        models = {
            "baseline": compressed(family),
            "pruned": compressed(family, tiny.KEEP[family]),
            "other": compressed(family, seed=1),
        }
        folder = tmp_path_factory.mktemp(family)
        before = len(made)
        OnnxExporter._template = None
        artifacts = {name: OnnxExporter().export(model, folder / name) for name, model in models.items()}
        template = OnnxExporter._template
        assert template is not None
        keep_trace(template)
        return Exported(models, artifacts, len(made) - before, template)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_template, "trace_decoder", counted)
        yield of
    OnnxExporter._template = None


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "artifact"
