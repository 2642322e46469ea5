"""Formats that are an ordinary Hugging Face checkpoint plus a manifest: ``torch`` and ``vllm``.

Depth pruning changes no layer's shape, so vLLM needs no custom model class: a checkpoint whose configuration agrees
with its tensors is all it asks for.  vLLM itself pins its own torch and transformers and lives in an environment of
its own; ``docs/vllm.md`` shows how to serve the folder with it.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from sglp_deploy import _io
from sglp_deploy.adapters import precision, quiet_libraries
from sglp_deploy.artifact import ExportArtifact, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.materialize import CompressedModel, write_checkpoint_files
from sglp_deploy.protocols import check_open_options
from sglp_deploy.reference import TorchRunner


class _CheckpointRunner(TorchRunner):
    """Loads the checkpoint when entered, with plain transformers and nothing of ours."""

    def __init__(self, folder: Path, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(None, threads=threads)
        self._folder = folder
        self._device = device

    def __enter__(self) -> TorchRunner:
        from transformers import AutoModelForCausalLM

        try:
            with quiet_libraries():
                model = AutoModelForCausalLM.from_pretrained(self._folder, dtype="auto", use_safetensors=True)
                self._model = model.to(self._device).eval()
        except Exception as error:
            raise BackendError(
                f"transformers cannot load {self._folder} on {self._device}; {str(error).splitlines()[0]}; check the "
                "device, or export the artifact again"
            ) from error
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._model = None


def _export(model: CompressedModel, out_dir: Path, name: str, details: dict[str, Any]) -> ExportArtifact:
    with _io.staged_directory(out_dir) as folder:
        write_checkpoint_files(model, folder)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        write_manifest(
            folder,
            format=name,
            inputs=(),
            outputs=(),
            precision=precision(model.module),
            weight_bytes=weights,
            n_layers=model.n_layers,
            plan_digest=model.plan.digest(),
            model=model.source.to_json(),
            producer=producer_versions("torch", "transformers", "safetensors"),
            details=details,
        )
    return ExportArtifact.load(out_dir, check_files=False)


def _no_options(name: str, options: dict[str, Any]) -> None:
    if options:
        raise ConfigError(
            f"exporter {name!r} does not know {', '.join(sorted(options))}; it writes the weights as they are; leave "
            "the options out"
        )


class TorchExporter:
    """A checkpoint measured and verified in eager PyTorch."""

    name = "torch"
    requires = ("torch", "transformers")

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the checkpoint and its manifest."""
        _no_options(self.name, options)
        return _export(model, Path(out_dir), self.name, {"runner": "PyTorch eager, transformers"})

    def open(self, artifact: ExportArtifact, **options: Any) -> TorchRunner:
        """A PyTorch runner on ``device`` with ``threads``."""
        return _CheckpointRunner(artifact.path, **check_open_options(self.name, options))


class VllmExporter:
    """A checkpoint for ``vllm serve FOLDER``; verified through transformers, which reads the same files."""

    name = "vllm"
    requires = ("torch", "transformers")

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the checkpoint and its manifest."""
        _no_options(self.name, options)
        details = {
            "runner": "transformers stands in for vLLM: it reads the same files",
            "serve": "vllm serve FOLDER --dtype auto",
            "architectures": list(model.module.config.architectures or [type(model.module).__name__]),
        }
        return _export(model, Path(out_dir), self.name, details)

    def open(self, artifact: ExportArtifact, **options: Any) -> TorchRunner:
        """A PyTorch runner over the folder vLLM would load."""
        return _CheckpointRunner(artifact.path, **check_open_options(self.name, options))
