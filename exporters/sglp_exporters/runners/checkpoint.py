"""What formats that are a checkpoint plus a manifest share: writing the folder, and running it in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from sglp_deploy import _io
from sglp_deploy.artifact import ExportArtifact, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.materialize import CompressedModel, write_checkpoint_files
from sglp_deploy.models import adapter_of_folder, precision
from sglp_deploy.parity.reference import TorchRunner


class CheckpointRunner(TorchRunner):
    """Loads the checkpoint when entered, with plain calls of its own library.

    Attributes:
        description: What runs, when it is not the format's own runtime.
        stands_in_for: That format; a benchmark refuses to file times under a runtime that did not run.
    """

    description = ""
    stands_in_for = ""

    def __init__(self, folder: Path, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(None, threads=threads)
        self._folder = folder
        self._device = device

    def __enter__(self) -> TorchRunner:
        adapter = adapter_of_folder(self._folder)
        library = adapter.name if adapter else "no known library"
        try:
            if adapter is None:
                raise ValueError("its config.json names no model")  # worded below like other failures
            self._model = adapter.load(self._folder).to(self._device)
        except Exception as error:
            raise BackendError(
                f"{library} cannot load {self._folder} on {self._device}; {str(error).splitlines()[0]}; check the "
                "device, or export the artifact again"
            ) from error
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._model = None


def export_checkpoint(
    model: CompressedModel,
    out_dir: Path,
    name: str,
    details: dict[str, Any],
    more: Callable[[Path], None] = lambda _folder: None,
) -> ExportArtifact:
    """Write the checkpoint, what ``more`` adds to its folder, and the manifest over all of it."""
    with _io.staged_directory(out_dir) as folder:
        left = write_checkpoint_files(model, folder)
        more(folder)
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
            details=details | ({"left_behind": dict(left)} if left else {}),
        )
    return ExportArtifact.load(out_dir, check_files=False)


def refuse_options(name: str, options: dict[str, Any]) -> None:
    """Refuse every export option.

    Raises:
        ConfigError: Naming those that were given.
    """
    if options:
        raise ConfigError(
            f"exporter {name!r} does not know {', '.join(sorted(options))}; it writes the weights as they are; leave "
            "the options out"
        )
