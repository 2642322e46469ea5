"""What an artifact's folder is opened as: an engine that was built on this device, or the ONNX in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglp_deploy import _io, registry
from sglp_deploy.artifact import BUILT, ExportArtifact
from sglp_deploy.errors import ArtifactError
from sglp_deploy.protocols import Runner
from sglp_exporters.onnx.runner import MODEL_FILE
from sglp_exporters.tensorrt.build import ENGINE_FILE, KIT_FILE, REPORT_FILE, SCRIPT_FILE


def stand_in(artifact: ExportArtifact, network_sha256: str, options: Mapping[str, Any]) -> Runner:
    """A runner of the ONNX in the folder, after making sure that it is what TensorRT was given."""
    from sglp_exporters.onnx.passes import required_inputs

    network = _io.read_json(artifact.path / KIT_FILE, "tensorrt-kit")["network"]
    same = artifact.files[network].sha256 == network_sha256
    if same and network != MODEL_FILE:
        same = (artifact.path / network).read_bytes() == required_inputs(artifact.path / MODEL_FILE)
    if not same:
        raise ArtifactError(
            f"the ONNX in {artifact.path} is not the one TensorRT was given; a certificate would be about another "
            "graph; export it again"
        )
    onnx_part = replace(artifact, format="onnx", details=artifact.details["onnx"])
    runner: Any = registry.exporter("onnx").open(onnx_part, **options)
    # A certificate repeats the first; a benchmark of something else than the format it is filed under would mislead.
    runner.description = str(artifact.details["runner"])
    runner.stands_in_for = artifact.format
    opened: Runner = runner
    return opened


def built_here(folder: Path, network_sha256: str) -> tuple[Path, dict[str, Any]]:
    """The newest engine that ``build.py`` left in a kit's folder, and its report."""
    reports = sorted(folder.glob(f"{BUILT}/*/{REPORT_FILE}"), key=lambda file: file.stat().st_mtime)
    if not reports:
        raise ArtifactError(
            f"there is no engine in {folder / BUILT}; a kit is built on its target; run python {SCRIPT_FILE} there"
        )
    report = _io.read_json(reports[-1], "tensorrt-build")
    engine = reports[-1].parent / ENGINE_FILE
    try:
        of_this_kit = report["network"]["sha256"] == network_sha256
        whole = engine.is_file() and _io.sha256_file(engine) == report["engine"]["sha256"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{reports[-1]} lacks a field; {error!r}; run {SCRIPT_FILE} again") from error
    if not (of_this_kit and whole):
        raise ArtifactError(
            f"{engine} is not an engine of this kit, or was altered; its digests differ; run {SCRIPT_FILE} again"
        )
    return engine, report
