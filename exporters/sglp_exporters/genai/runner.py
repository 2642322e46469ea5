"""ONNX Runtime GenAI as a runner: one generator for each row of a batch.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.artifact import PRESENT, ExportArtifact
from sglp_deploy.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import onnxruntime_genai

CONFIG_FILE = "genai_config.json"
# Tokens a sequence may grow by before its cache, whose size is fixed when it is made, is made anew.
_ROOM = 1024


class OrtGenaiRunner:
    """ONNX Runtime GenAI's generator, one for each row; a row is given without its padding.

    A generator of several rows takes tokens from outside only once, so rows run one after another.

    Args:
        artifact: An ``ort-genai`` artifact.
        device: "cpu".
        threads: Threads within one operator, or None for ONNX Runtime's choice.
    """

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        if device != "cpu":
            raise ConfigError(
                f"ort-genai artifacts are built for the cpu, not for {device!r}; a number taken there would be "
                "mislabelled; pass --device cpu"
            )
        self._folder = artifact.path
        self._precision = artifact.precision
        self._cached = [spec.name for spec in artifact.outputs if spec.name.startswith(PRESENT)]
        self._threads = threads
        self._model: onnxruntime_genai.Model | None = None
        self._longest = 0
        self._rows: list[_Row] = []
        self.description = "ONNX Runtime GenAI"

    def __enter__(self) -> OrtGenaiRunner:
        """Load the graph.

        Raises:
            BackendError: If ONNX Runtime GenAI refuses the folder.
        """
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        try:
            config = og.Config(str(self._folder))
            if self._threads is not None:
                session = {"intra_op_num_threads": self._threads}
                config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
            self._model = og.Model(config)
            self._longest = int(settings(self._folder)["context_length"])
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime GenAI {og.__version__} cannot load {self._folder}; {_first_line(error)}; export it again"
            ) from error
        if self._model.device_type != "CPU":  # its own folder may name another provider than was asked for
            raise BackendError(
                f"ONNX Runtime GenAI went to {self._model.device_type} although cpu was asked for; a number taken "
                f"there would be mislabelled; take provider_options out of {CONFIG_FILE}"
            )
        compared = "" if self._precision == "fp32" else f"; weights are {self._precision}, the reference's are not"
        self.description = f"ONNX Runtime GenAI {og.__version__} on cpu, rows one after another{compared}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the graph and the caches."""
        self._rows, self._model = [], None

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits of every position of ``input_ids``; sequences that were being continued stay as they are.

        For a single row also what its cache holds then, under the graph's names.
        """
        rows, self._rows = self._rows, []
        try:
            logits = self.prefill(inputs["input_ids"], inputs.get("attention_mask"), all_positions=True)
            cache = self._rows[0].cache(self._cached) if len(self._rows) == 1 else {}
            return {"logits": logits, **cache}
        finally:
            self._rows = rows

    def synchronize(self) -> None:
        """Calls return when results exist."""

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`; logits at padding are zeros."""
        if self._model is None:
            raise BackendError("the runner is not active; its graph is loaded by 'with'; use it as a context manager")
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._rows = []  # first: the old caches' memory is needed for the new ones
        found = []
        for ids, real in zip(input_ids, mask, strict=True):
            row = _Row(self._model, ids[real == 1].tolist(), self._longest)
            logits = row.start(all_positions=all_positions)
            padding = np.zeros((len(ids) - len(logits) if all_positions else 0, logits.shape[1]), dtype=np.float32)
            found.append(np.concatenate([padding, logits]))
            self._rows.append(row)
        return np.stack(found) if all_positions else np.concatenate(found)

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`sglp_deploy.protocols.GeneratingRunner`."""
        if not self._rows:
            raise BackendError("decode was called before prefill; there is no sequence to continue; call prefill first")
        tokens = np.asarray(token_ids).reshape(-1).tolist()
        return np.concatenate([row.step(token) for row, token in zip(self._rows, tokens, strict=True)])


class _Row:
    """One sequence and its generator, whose cache is allocated for a fixed number of tokens."""

    def __init__(self, model: onnxruntime_genai.Model, tokens: list[int], longest: int) -> None:
        self._model = model
        self._tokens = tokens
        self._longest = longest
        self._size = 0
        self._generator: onnxruntime_genai.Generator | None = None

    def start(self, *, all_positions: bool = False) -> NDArray[np.float32]:
        """Run all tokens through an empty cache; logits (1, vocab) of the last, or (tokens, vocab)."""
        import onnxruntime_genai as og

        if len(self._tokens) >= self._longest:
            raise BackendError(
                f"{len(self._tokens)} tokens leave no room in a context of {self._longest}; ONNX Runtime GenAI stops "
                "there; give a shorter prompt"
            )
        self._size = min(self._longest, len(self._tokens) + _ROOM)
        settings = og.GeneratorParams(self._model)
        settings.set_search_options(max_length=self._size, batch_size=1, do_sample=False)
        self._generator = og.Generator(self._model, settings)
        return self._append(self._tokens, all_positions=all_positions)

    def step(self, token: int) -> NDArray[np.float32]:
        """Logits (1, vocab) after one more token."""
        self._tokens.append(token)
        # It refuses the token that would fill its cache.
        return self.start() if len(self._tokens) >= self._size else self._append([token])

    def cache(self, names: list[str]) -> dict[str, NDArray[Any]]:
        """Outputs of the graph that hold keys and values, without the room after the last token."""
        assert self._generator is not None
        return {name: self._generator.get_output(name)[:, :, : len(self._tokens)] for name in names}

    def _append(self, tokens: list[int], *, all_positions: bool = False) -> NDArray[np.float32]:
        assert self._generator is not None
        try:
            self._generator.append_tokens(np.array([tokens], dtype=np.int32))
            # Read here and nowhere else: after generate_next_token this output is the step before's.
            logits = self._generator.get_output("logits")[0] if all_positions else self._generator.get_logits()[0]
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime GenAI failed on a sequence of {len(self._tokens)} tokens; {_first_line(error)}; check "
                "the tokens, or export the artifact again"
            ) from error
        values: NDArray[np.float32] = np.array(logits, dtype=np.float32)
        return values


def settings(folder: Path) -> dict[str, Any]:
    """What the runtime is told of the model."""
    settings: dict[str, Any] = _io.parse_json((folder / CONFIG_FILE).read_text(encoding="utf-8"), ours=False)["model"]
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
