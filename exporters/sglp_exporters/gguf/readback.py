"""What stands in for llama.cpp where its environment is not there: transformers reading the GGUF back."""

from __future__ import annotations

import contextlib
import io
from types import TracebackType

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BackendError
from sglp_deploy.models import quiet_libraries
from sglp_deploy.parity.reference import TorchRunner
from sglp_exporters.gguf.runner import MODEL_FILE


class ReadBackRunner(TorchRunner):
    """transformers over the dequantised file; verified with, never measured.

    Attributes:
        description: What runs.
        stands_in_for: The format.
    """

    description = "transformers reading the GGUF back, in place of llama.cpp: there is no environment 'gguf'"
    stands_in_for = "gguf"

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(None, threads=threads)
        self._folder = artifact.path
        self._device = device

    def __enter__(self) -> TorchRunner:
        """Load the file.

        Raises:
            BackendError: If transformers cannot read it.
        """
        try:
            with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):  # its reader draws a bar
                model = AutoModelForCausalLM.from_pretrained(
                    self._folder,
                    gguf_file=MODEL_FILE,
                    quantization_config=GgufConfig(gguf_file=MODEL_FILE, dequantize=True),
                    dtype=torch.float32,
                )
            self._model = model.to(self._device).eval()
        except Exception as error:
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackendError(
                f"transformers cannot read {self._folder / MODEL_FILE} back; {words}; make the environment that holds "
                "llama.cpp ('sglp-deploy env create gguf') and verify there"
            ) from error
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the model."""
        super().__exit__(kind, error, trace)
        self._model = None
