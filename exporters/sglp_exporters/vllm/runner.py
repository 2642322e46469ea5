"""vLLM as a runner: a worker in an interpreter that holds it, asked for logits request by request.

Nothing here may import torch: vLLM brings its own, in another interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.isolation.workers import Worker
from sglp_exporters.runners.rows import RowsRunner

_WORKER = Path(__file__).with_name("worker.py")
_START_TIMEOUT_S = 900.0
# Room for the longest parity prompt and its decode steps; a longer window asks for more.
_TOKENS = 512


class VllmRunner(RowsRunner):
    """vLLM as a generating runner, one request for each row; it pads nothing, so padding is left out on the way.

    ``decode`` continues a sequence as a server does with its prefix cache: whole blocks are read from the cache and the
    rest is computed.  ``greedy`` is vLLM's own decode loop.

    Args:
        folder: The checkpoint.
        python: Interpreter of an environment that holds vLLM.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads, or None for vLLM's own choice.
        max_tokens: Longest sequence that will be run.
    """

    not_timed = (
        "each of its steps is a request of its own that hands back the whole vocabulary, which is not how vLLM serves; "
        "measure the folder with vLLM's own benchmark (docs/vllm.md)"
    )

    def __init__(
        self,
        folder: Path,
        python: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        max_tokens: int = _TOKENS,
    ) -> None:
        config = _io.parse_json((folder / "config.json").read_text(encoding="utf-8"), ours=False)
        dtype = str(config.get("dtype") or "float32")
        positions = config.get("max_position_embeddings") or max_tokens
        window = config.get("sliding_window") or 0
        self._start = {
            "folder": str(folder.resolve()),
            "dtype": dtype,
            "max_model_len": int(min(positions, max(max_tokens, window + max_tokens))),
        }
        environment = _device_environment(device)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._worker = Worker(python, _WORKER, name="vLLM", environment=environment)
        self._facts: dict[str, Any] = {}
        self._rows: list[list[int]] = []

    def __enter__(self) -> VllmRunner:
        """Start vLLM and load the folder.

        Raises:
            BackendError: If vLLM cannot load it; the message has its last words.
        """
        self._worker.__enter__()
        try:
            self._facts = self._worker.ask("start", timeout_s=_START_TIMEOUT_S, **self._start)
        except BaseException:
            self._worker.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End vLLM."""
        self.forget_rows()
        self._worker.__exit__(kind, error, trace)

    @property
    def description(self) -> str:
        """What ran, for certificates: version and key-value cache capacity."""
        if not self._facts:
            return "vLLM"
        return f"vLLM {self._facts['vllm']}, room for {self._facts['kv_cache_tokens']} tokens in its key-value cache"

    @property
    def facts(self) -> Mapping[str, Any]:
        """Version, vocabulary, and key-value cache capacity in tokens; empty before it is entered."""
        return self._facts

    def forget_rows(self) -> None:
        """See :class:`RowsRunner`."""
        super().forget_rows()
        self._rows = []

    def start_rows(self, rows: list[list[int]], *, every_position: bool) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        self._rows = rows
        return self._logits(rows, every_position=every_position)

    def continue_rows(self, tokens: list[int]) -> NDArray[np.float32]:
        """See :class:`RowsRunner`."""
        self._rows = [[*row, token] for row, token in zip(self._rows, tokens, strict=True)]
        return self._logits(self._rows, every_position=False)

    def greedy(self, steps: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Continue the rows of the last prefill by vLLM's own decode loop; (batch, steps) and (batch, steps, vocab)."""
        answer = self._worker.ask("greedy", rows=self._rows, steps=steps)
        return answer["tokens"], self._cut(answer["logits"])

    def _logits(self, rows: list[list[int]], *, every_position: bool) -> NDArray[np.float32]:
        return self._cut(self._worker.ask("logits", rows=rows, every_position=every_position)["logits"])

    def _cut(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Without the columns vLLM pads the vocabulary with."""
        return logits[..., : int(self._facts["vocab"])]


def _device_environment(device: str) -> dict[str, str]:
    """What makes "cuda:N" the one device that vLLM sees; it always takes the first."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    return {"CUDA_VISIBLE_DEVICES": names[int(index)] if int(index) < len(names) else index}
