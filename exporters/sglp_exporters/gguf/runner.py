"""GGUF files as a Runner: llama.cpp in the interpreter of its own environment.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BackendError, ConfigError
from sglp_deploy.isolation.workers import Worker
from sglp_exporters.runners.rows import RowsRunner

MODEL_FILE = "model.gguf"
_WORKER = Path(__file__).with_name("llama_cpp_worker.py")


def _usable_processors() -> int:
    """Those this process may use; macOS does not say and has all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaCppRunner(RowsRunner):
    """llama.cpp as a generating runner; each row is a sequence of its own and is given without its padding.

    A float32 file is run with a float32 cache and plain attention; others as llama.cpp does by itself, with a float16
    cache and flash attention.

    Args:
        artifact: A ``gguf`` artifact.
        python: Interpreter of an environment that holds xllamacpp.
        device: "cpu".
        threads: CPU threads, or None for all that this process may use.
    """

    def __init__(
        self, artifact: ExportArtifact, python: Path, *, device: str = "cpu", threads: int | None = None
    ) -> None:
        if device != "cpu":
            raise ConfigError(
                f"the llama.cpp of the environment 'gguf' computes on the cpu, not on {device!r}; a number taken there "
                "would be mislabelled; pass --device cpu"
            )
        self._artifact = artifact
        self._exact = artifact.precision == "fp32"
        self._threads = threads or _usable_processors()
        self._worker = Worker(python, _WORKER, name="llama.cpp", environment={"OMP_NUM_THREADS": str(self._threads)})
        self._facts: dict[str, Any] = {}

    def __enter__(self) -> LlamaCppRunner:
        """Start llama.cpp and load the file.

        Raises:
            BackendError: If it cannot load it, or finds other layers in it than the manifest says.
        """
        self._worker.__enter__()
        try:
            file = str((self._artifact.path / MODEL_FILE).resolve())
            self._facts = self._worker.ask("start", file=file, threads=self._threads, exact=self._exact)
            if self._facts["layers"] != self._artifact.n_layers:
                raise BackendError(
                    f"llama.cpp finds {self._facts['layers']} layers in {file}, the manifest says "
                    f"{self._artifact.n_layers}; the file was exchanged; export it again"
                )
        except BaseException:
            self._worker.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End llama.cpp."""
        self.forget_rows()
        self._worker.__exit__(kind, error, trace)

    @property
    def description(self) -> str:
        """What ran, for certificates: version, and how it kept keys and values."""
        if not self._facts:
            return "llama.cpp"
        cache = "float32 cache, no flash attention" if self._exact else "float16 cache, flash attention"
        return f"llama.cpp {self._facts['llama_cpp']} (xllamacpp {self._facts['xllamacpp']}) on cpu, {cache}"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Versions, layers, words and context length as llama.cpp sees them; empty before it is entered."""
        return self._facts

    def start_rows(self, rows: list[list[int]], *, every_position: bool) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        found: NDArray[np.float32] = self._worker.ask("prefill", rows=rows, every_position=every_position)["logits"]
        return found

    def continue_rows(self, tokens: list[int]) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        found: NDArray[np.float32] = self._worker.ask("decode", tokens=tokens)["logits"]
        return found

    def tokenize(self, text: str) -> list[int]:
        """The tokens llama.cpp makes of ``text`` by the tokenizer in the file, without any it would add in front."""
        tokens: list[int] = self._worker.ask("tokenize", text=text)["tokens"]
        return tokens
