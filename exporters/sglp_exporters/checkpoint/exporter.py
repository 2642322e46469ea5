"""The ``torch`` format: an ordinary checkpoint of the model's own library, plus a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.protocols import check_open_options
from sglp_exporters.runners import stored_weights

# Nothing here may import torch at its top: a run that has nothing to do comes this way.
if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor
    from sglp_deploy.parity.reference import TorchRunner


class TorchExporter:
    """A checkpoint measured and verified in eager PyTorch."""

    name = "torch"
    requires = ("torch", "transformers")

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: transformers reads ``layer_types``."""
        del model_type
        return None

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the checkpoint and its manifest."""
        from sglp_exporters.runners.checkpoint import export_checkpoint, refuse_options

        refuse_options(self.name, options)
        return export_checkpoint(model, Path(out_dir), self.name, {"runner": "PyTorch eager, transformers"})

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_safetensors(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> TorchRunner:
        """A PyTorch runner on ``device`` with ``threads``."""
        from sglp_exporters.runners.checkpoint import CheckpointRunner

        return CheckpointRunner(artifact.path, **check_open_options(self.name, options))
