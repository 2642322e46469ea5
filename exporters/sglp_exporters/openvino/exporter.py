"""OpenVINO: the ONNX graph as an intermediate representation (IR), with its weights as they are or rounded to fp16.

Rounded weights are a compression and no other arithmetic.  On a CPU the IR still computes in float32.  So its
certificate compares it with the model as it was before the rounding.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sglp_deploy import _io, registry
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError, StorageError
from sglp_deploy.protocols import FormatFacts, check_open_options
from sglp_exporters.onnx.runner import MODEL_FILE as ONNX_FILE
from sglp_exporters.onnx.runner import ONNX_PACKAGES
from sglp_exporters.openvino.runner import (
    MODEL_FILE,
    WEIGHTS_FILE,
    OpenVinoForwardRunner,
    OpenVinoRunner,
    reason,
    version,
)
from sglp_exporters.runners import stored_weights
from sglp_exporters.runners.openvino_alone import load_openvino

if TYPE_CHECKING:
    import openvino

    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

__all__ = ["OpenVinoExporter", "OpenVinoForwardRunner", "OpenVinoRunner"]

_PRECISIONS = ("fp32", "fp16")


class OpenVinoExporter:
    """Converts what the ``onnx`` exporter makes and runs it on OpenVINO."""

    name = "openvino"
    requires = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino")
    facts = FormatFacts(packages=(*ONNX_PACKAGES, "openvino"))

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the graph is traced from layers that were built by ``layer_types``."""
        del model_type
        return None

    def check_precision(self, precision: str) -> None:
        """Refuse what the ``onnx`` exporter refuses, before any work."""
        check = getattr(registry.exporter("onnx"), "check_precision", None)
        if check is not None:
            check(precision)

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write ``model.xml``, ``model.bin``, the plan and the manifest.

        Args:
            model: What to export.
            out_dir: Complete or untouched.
            options: ``precision``: of the weights in the file, "fp32" or "fp16"; the model's own when omitted.

        Raises:
            ConfigError: If an option is unknown, or the precision cannot be had from this model.
            BackendError: If the model cannot be traced, or OpenVINO cannot convert the graph.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of

        own = precision_of(model.module)
        self.check_precision(own)
        wanted = _precision(options, own)
        with _io.staged_directory(Path(out_dir)) as folder:
            traced = registry.exporter("onnx").export(model, folder / "onnx")
            network = _convert(traced.path)
            _save(network, folder, compress=wanted != own)
            del network  # it maps the weights' file, which some systems then cannot remove
            shutil.rmtree(traced.path)
            model.plan.save(folder / PLAN_FILE)
            write_manifest(
                folder,
                format=self.name,
                inputs=traced.inputs,
                outputs=traced.outputs,
                precision=wanted,
                weight_bytes=(folder / WEIGHTS_FILE).stat().st_size,
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                derived_from=traced.derived_from,
                producer=producer_versions("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "openvino"),
                details={
                    "interface": traced.details["interface"],
                    "model_precision": own,
                    "onnx": dict(traced.details),
                },
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_openvino(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> OpenVinoRunner | OpenVinoForwardRunner:
        """A runner on ``device`` ("cpu", or OpenVINO's own name for another: "gpu", "gpu.1", "npu") with ``threads``.

        It generates if the graph has a cache.
        """
        checked = check_open_options(self.name, options)
        if artifact.details.get("interface") == "forward":
            return OpenVinoForwardRunner(artifact, **checked)
        return OpenVinoRunner(artifact, **checked)


def _precision(options: dict[str, Any], own: str) -> str:
    """The element type asked for, where a model of type ``own`` can be written in it."""
    for name in options:
        if name != "precision":
            raise unknown_name("option of exporter 'openvino'", name, ("precision",))
    wanted = options.get("precision") or own
    if wanted not in _PRECISIONS:
        raise ConfigError(
            f"precision={wanted!r} is not offered; an IR's weights are {' or '.join(_PRECISIONS)} here; pass one of "
            "them"
        )
    if own == "fp16" and wanted == "fp32":
        raise ConfigError(
            "precision='fp32' was asked for a model whose weights are fp16; the file would hold twice the bytes and "
            "the same numbers; load the model with --dtype fp32, or leave precision out"
        )
    return str(wanted)


def _convert(folder: Path) -> openvino.Model:
    """The network of the ONNX in ``folder``, every input of which is really one."""
    from sglp_exporters.onnx.passes import required_inputs

    # OpenVINO, too, takes an input that has a default for a constant: only the last position's logits would remain.
    required = folder / "required.onnx"
    required.write_bytes(required_inputs(folder / ONNX_FILE))
    try:
        return cast("openvino.Model", load_openvino().Core().read_model(required))
    except Exception as error:
        raise BackendError(
            f"OpenVINO {version()} cannot convert the graph; {reason(error)}; export to onnx and report the operator"
        ) from error


def _save(network: openvino.Model, folder: Path, *, compress: bool) -> None:
    try:
        load_openvino().save_model(network, folder / MODEL_FILE, compress_to_fp16=compress)
    except Exception as error:
        if "iostream" not in str(error):
            raise BackendError(
                f"OpenVINO {version()} cannot write the graph; {reason(error)}; export to onnx and report this"
            ) from error
        # All it says of a full disk is "basic_ios::clear: iostream error".
        raise StorageError(
            f"cannot write {folder / WEIGHTS_FILE}; OpenVINO's file could not be completed; free some space and run "
            "the same command again"
        ) from error
