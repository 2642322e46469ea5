"""ONNX Runtime GenAI: the graph its own model builder makes of the pruned checkpoint, in fp32, int8 or int4.

The builder shares nothing with our tracing, so its certificate checks another path from the same weights.  Quantised
weights are a compression of the pruned model and are compared with that model, unquantised: the certificate then says
what quantisation costs, within the bounds for its type.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import (
    PAST,
    PLAN_FILE,
    PRESENT,
    ExportArtifact,
    TensorSpec,
    producer_versions,
    write_manifest,
)
from sglp_deploy.errors import BackendError, ConfigError, UnsupportedModelError
from sglp_deploy.protocols import check_open_options
from sglp_exporters.runners import stored_weights

if TYPE_CHECKING:
    import onnxruntime_genai

    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"
_PRECISIONS = ("fp32", "int8", "int4")
_BUILDER = "onnxruntime_genai.models.builder"
_PLAIN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_LAST_WORDS = 400  # characters of a builder's last words that are repeated
# Tokens a sequence may grow by before its cache, whose size is fixed when it is made, is made anew.
_ROOM = 1024


class OrtGenaiExporter:
    """Runs ONNX Runtime GenAI's model builder for the CPU, and its generator."""

    name = "ort-genai"
    requires = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai")

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """The builder reads ``layer_types``, except for GPT-OSS, whose even layers it lets slide whatever they say.

        Source: ``self.is_local = lambda layer_id: bool(layer_id % 2 == 0)`` in onnxruntime_genai/models/builders/
        gptoss.py, 0.18; the others go by ``Model.is_local`` in base.py.
        """
        return _gpt_oss_layer_type if model_type == "gpt_oss" else None

    def check_precision(self, precision: str) -> None:
        """Refuse weights that are not float32; a caller may ask before it spends time on a plan.

        Raises:
            ConfigError: If ``precision`` is "fp16" or "bf16".
        """
        if precision != "fp32":
            raise ConfigError(
                f"the weights are {precision}; the builder's graphs for CPUs compute in float32, so a certificate "
                "would compare two arithmetics; load the model with --dtype fp32"
            )

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the builder's graph, its configuration, the tokenizer, the plan and the manifest.

        Args:
            model: What to export; it needs a tokenizer.
            out_dir: Complete or untouched.
            options: ``precision``: of the weights in the file, "fp32" (default), "int8" or "int4".

        Raises:
            ConfigError: If an option is unknown or wrong, or the weights are not float32.
            UnsupportedModelError: If the builder does not know the model, or would leave out its attention window.
            BackendError: If the builder fails.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of
        from sglp_deploy.models.samples import generates

        for name in options:
            if name != "precision":
                raise unknown_name(f"option of exporter {self.name!r}", name, ("precision",))
        wanted = options.get("precision") or "fp32"
        if wanted not in _PRECISIONS:
            raise ConfigError(
                f"precision={wanted!r} is not offered; weights are {', '.join(_PRECISIONS)} here; pass one of them"
            )
        own = precision_of(model.module)
        self.check_precision(own)
        if not generates(model.module):
            raise UnsupportedModelError(
                f"{type(model.module).__name__} is no decoder language model; ONNX Runtime GenAI runs nothing else "
                "here; export it to onnx or openvino"
            )
        if model.tokenizer is None:
            raise ConfigError(
                "the model has no tokenizer; the builder copies it beside the graph and reads its special tokens; "
                "load a folder that holds one"
            )
        _check_window(model.module.config)
        with _io.staged_directory(Path(out_dir)) as folder:
            _build(model, folder, wanted)
            model.plan.save(folder / PLAN_FILE)
            graph = _graph(folder)
            write_manifest(
                folder,
                format=self.name,
                inputs=graph["inputs"],
                outputs=graph["outputs"],
                precision=wanted,
                weight_bytes=sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}.data")),
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer=producer_versions("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai"),
                details={"interface": "decoder", "model_precision": own, "operators": graph["operators"]},
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> OrtGenaiRunner:
        """A generating runner on "cpu" with ``threads``."""
        return OrtGenaiRunner(artifact, **check_open_options(self.name, options))


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
            self._longest = int(_settings(self._folder)["context_length"])
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


def _gpt_oss_layer_type(index: int) -> str:
    return "full_attention" if index % 2 else "sliding_attention"


def _check_window(config: Any) -> None:
    """Refuse a window the builder would not see: it goes by ``layer_types``, which some families do not have.

    Raises:
        UnsupportedModelError: If a layer has a window and no ``layer_types`` says so.
    """
    window = getattr(config, "sliding_window", None)
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if window and window < positions and getattr(config, "layer_types", None) is None:
        # Its graph then attends to everything while its runtime keeps a cache of the window's length, and stops.
        raise UnsupportedModelError(
            f"every layer of this {config.model_type} attends through a window of {window} tokens, which ONNX Runtime "
            "GenAI's builder sees only in layer_types; longer sequences would fail; export it to onnx or openvino"
        )


def _build(model: CompressedModel, folder: Path, precision: str) -> None:
    """Run the builder in a process of its own: it imports its modules by bare names and prints as it likes."""
    from sglp_deploy.materialize import write_checkpoint_files

    # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint_files(model, checkpoint)
        command = [sys.executable, "-m", _BUILDER, "-m", "none", "-i", str(checkpoint), "-o", str(folder)]
        command += ["-p", precision, "-e", "cpu", "-c", str(scratch / "cache")]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if done.returncode == 0 and (folder / MODEL_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1][-_LAST_WORDS:] if lines else f"it ended with {done.returncode} and said nothing"
    if last.startswith("NotImplementedError") or "is not currently supported" in last:
        raise UnsupportedModelError(
            f"ONNX Runtime GenAI's builder does not know {type(model.module).__name__}; it knows chosen families "
            "only; export it to onnx or openvino"
        )
    raise BackendError(
        f"ONNX Runtime GenAI's builder failed on this {type(model.module).__name__}; {last}; export it to onnx or "
        "openvino, or try another release of onnxruntime-genai"
    )


def _graph(folder: Path) -> dict[str, Any]:
    """Inputs and outputs of the graph, as a manifest holds them, and how many of its operators there are."""
    import onnx

    graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
    # The builder leaves the width of a cached key open; the runtime allocates what its configuration says.
    sizes = {"kv_cache_dim": int(_settings(folder)["decoder"]["head_size"])}

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(sizes.get(size.dim_param, size.dim_param) or int(size.dim_value) for size in tensor.shape.dim)
        return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)

    inputs = tuple(map(spec, graph.input))
    # The state of convolutions and recurrences has no place in the common interface, so none of it is declared; the
    # runtime keeps it, and parity is judged all the same.
    common = all(each.name in _PLAIN_INPUTS or each.name.startswith(PAST) for each in inputs)
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "inputs": inputs if common else (),
        "outputs": tuple(map(spec, graph.output)) if common else (),
        "operators": dict(sorted(operators.items())),
    }


def _settings(folder: Path) -> dict[str, Any]:
    """What the runtime is told of the model."""
    settings: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model"]
    return settings


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
