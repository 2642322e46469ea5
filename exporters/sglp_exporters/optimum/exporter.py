"""The ``optimum`` format: the ONNX graph that Hugging Face's optimum-onnx makes, for those whose programs load it so.

optimum-onnx pins an older transformers.  So it exports the pruned checkpoint in an environment of its own.
``sglp-deploy env create optimum`` makes it.  The graph shares nothing with our tracing.  ONNX Runtime runs it here for
its certificate.  optimum's own class must continue a prompt with the same tokens before the artifact gets its name.

Nothing here may import torch: a benchmark's worker comes this way, and its memory must be the artifact's alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglp_deploy import _io
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, TensorSpec, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError, StorageError, UnsupportedModelError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_deploy.protocols import FormatFacts, check_open_options
from sglp_exporters.onnx.runner import MODEL_FILE, OnnxRuntimeRunner
from sglp_exporters.optimum.environment import ENVIRONMENT
from sglp_exporters.runners import stored_weights

if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

_WORKER = Path(__file__).with_name("worker.py")
_TIMEOUT_S = 3600.0
_PROMPT, _STEPS = 8, 12  # tokens that optimum's own class is given, and continues with
_LAST_WORDS = 300  # characters of an error of optimum's that are repeated
_SURE = 0.01  # gap between the best two logits above which another choice is no near tie


class OptimumExporter:
    """optimum-onnx's graph of a decoder with its cache, run on ONNX Runtime."""

    name = "optimum"
    requires = ("torch", "transformers", "onnx", "onnxruntime")
    # Our own ONNX Runtime runs it; what the environment holds decides the graph, and whether there is one.
    facts = FormatFacts(
        environments=(ENVIRONMENT,),
        environment=ENVIRONMENT.name,
        packages=("onnx", "onnxruntime", "onnxruntime-gpu"),
    )

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the graph is traced by a transformers that reads ``layer_types``."""
        del model_type
        return None

    def check_precision(self, precision: str) -> None:
        """Refuse weights that are not float32; a caller may ask before it spends time on a plan.

        Raises:
            ConfigError: If ``precision`` is "fp16" or "bf16".
        """
        if precision != "fp32":
            raise ConfigError(
                f"the weights are {precision}; on a CPU optimum exports float32 only; load the model with --dtype fp32"
            )

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write what ``optimum-cli export onnx`` writes, the plan and the manifest.

        Raises:
            ConfigError: If an option is given (there are none), or the weights are not float32.
            MissingDependencyError: If the environment ``optimum`` is not there.
            UnsupportedModelError: If it is no decoder with a cache, or optimum-onnx does not know the family.
            BackendError: If the export fails, or optimum's own class does not run what was written.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of
        from sglp_deploy.models.samples import generates

        if options:
            raise ConfigError(
                f"exporter {self.name!r} does not know {', '.join(sorted(options))}; it has no options; leave them out"
            )
        self.check_precision(precision_of(model.module))
        if not generates(model.module):
            raise UnsupportedModelError(
                f"{type(model.module).__name__} is no decoder language model; this format is for decoders with a cache "
                "only; export it to onnx"
            )
        config: Any = model.module.config
        python = environments.interpreter(ENVIRONMENT)
        with (
            _io.staged_directory(Path(out_dir)) as folder,
            Worker(python, _WORKER, name="optimum", timeout_s=_TIMEOUT_S) as worker,
        ):
            facts = _export(model, folder, worker)
            inputs, outputs, opset = _interface(folder)
            model.plan.save(folder / PLAN_FILE)
            artifact = write_manifest(
                folder,
                format=self.name,
                inputs=inputs,
                outputs=outputs,
                precision="fp32",
                weight_bytes=_weight_bytes(folder),
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer={
                    **producer_versions("torch", "transformers", "onnx", "onnxruntime"),
                    **{f"{name} (environment)": facts[name] for name in ("optimum-onnx", "transformers", "torch")},
                },
                details={
                    "runner": f"ONNX Runtime over the graph of optimum-onnx {facts['optimum-onnx']}",
                    "interface": "decoder",
                    "opset": opset,
                    "settings_not_read": facts["not_read"],
                },
            )
            _check_own_class(artifact, worker, config.get_text_config().vocab_size)
        return ExportArtifact.load(out_dir, check_files=False)

    def stored_weights(self, artifact: ExportArtifact) -> Iterator[StoredTensor]:
        """The weights in the files, by name; for checks of their types and values."""
        return stored_weights.of_onnx(artifact)

    def open(self, artifact: ExportArtifact, **options: Any) -> OnnxRuntimeRunner:
        """A generating runner on ``device`` ("cpu" or "cuda") with ``threads``: our own ONNX Runtime."""
        wanted = check_open_options(self.name, options)
        runner = OnnxRuntimeRunner(artifact, **wanted)
        runner.description = f"{artifact.details['runner']}, on {wanted.get('device', 'cpu')}"
        return runner


def _export(model: CompressedModel, folder: Path, worker: Worker) -> dict[str, Any]:
    """Write the checkpoint aside and have optimum export it into ``folder``."""
    from sglp_deploy.materialize import write_checkpoint_files

    name = type(model.module).__name__
    # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        checkpoint = Path(scratch)
        write_checkpoint_files(model, checkpoint)
        try:
            facts = worker.ask("export", folder=str(checkpoint.resolve()), out=str(folder.resolve()))
        except BackendError as error:
            words, first = str(error), str(error).splitlines()[0]
            if "No space left on device" in words:
                raise StorageError(f"cannot write {folder}; no space is left; free some and run it again") from error
            said = ("custom or unsupported architecture", "does not recognize this architecture", "doesn't support")
            if any(each in first for each in said):
                raise UnsupportedModelError(
                    f"optimum-onnx does not know {name}; {first.rpartition('; ')[2]}; export it to onnx"
                ) from error
            raise
    if not (folder / MODEL_FILE).is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.onnx"))) or "no graph"
        raise BackendError(f"optimum wrote {found} where one {MODEL_FILE} was expected; report this with the model")
    return facts


def _interface(folder: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
    """Inputs, outputs and opset of the graph."""
    import onnx

    loaded = onnx.load(str(folder / MODEL_FILE), load_external_data=False)

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        shape = tuple(size.dim_param or int(size.dim_value) for size in tensor.shape.dim)
        return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)

    opset = next(int(each.version) for each in loaded.opset_import if not each.domain)
    return tuple(map(spec, loaded.graph.input)), tuple(map(spec, loaded.graph.output)), opset


def _weight_bytes(folder: Path) -> int:
    """Of the graph's initializers, whichever file they lie in."""
    import onnx

    kept = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph.initializer
    return sum(math.prod(each.dims) * onnx.helper.tensor_dtype_to_np_dtype(each.data_type).itemsize for each in kept)


def _check_own_class(artifact: ExportArtifact, worker: Worker, vocabulary: int) -> None:
    """Refuse a folder that ``ORTModelForCausalLM`` does not continue a prompt from as the graph itself does.

    Raises:
        BackendError: Naming the first token that differs though the graph is sure of it.
    """
    prompt = [(7 + 31 * index) % vocabulary for index in range(_PROMPT)]
    try:
        found = worker.ask("greedy", folder=str(artifact.path.resolve()), prompt=prompt, steps=_STEPS)["tokens"]
    except BackendError as error:
        first = str(error).splitlines()[0]
        raise BackendError(
            f"ORTModelForCausalLM does not run what optimum exported; {first.partition('; ')[2][:_LAST_WORDS]}; export "
            "it to onnx, whose graph other programs run"
        ) from error
    with OnnxRuntimeRunner(artifact, threads=1) as runner:
        logits = runner.prefill(np.array([prompt]))
        for step, token in enumerate(found):
            second, best = np.partition(logits[0], -2)[-2:]
            if int(token) != int(logits[0].argmax()) and best - second > _SURE:
                raise BackendError(
                    f"ORTModelForCausalLM continues a prompt otherwise than its graph, from token {step} on; programs "
                    "that load the folder with it would get other answers; report this with the model"
                )
            logits = runner.decode(np.array([token]))
