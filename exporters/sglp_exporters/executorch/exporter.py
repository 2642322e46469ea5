"""ExecuTorch: one ``.pte`` for phones and boards, its matrix products and convolutions lowered to XNNPACK.

The model is traced here and lowered by a worker that has ExecuTorch (``sglp-deploy env create executorch``, or this
interpreter).  What ran where is read off the finished program.  ExecuTorch runs whatever no backend took with portable
kernels, tens of times slower and without a word.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sglp_deploy import _io
from sglp_deploy._names import unknown_name
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact, TensorSpec, producer_versions, write_manifest
from sglp_deploy.errors import BackendError, ConfigError, UnsupportedModelError
from sglp_deploy.isolation.workers import Worker
from sglp_deploy.protocols import FormatFacts, check_open_options
from sglp_exporters.executorch.environment import ENVIRONMENT
from sglp_exporters.executorch.runner import (
    MODEL_FILE,
    WORKER,
    ExecuTorchForwardRunner,
    ExecuTorchRunner,
    described,
    python,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from sglp_deploy.materialize import CompressedModel

__all__ = ["ExecuTorchExporter", "ExecuTorchForwardRunner", "ExecuTorchRunner"]

_OPTIONS = ("max_tokens", "precision")
_PRECISIONS = ("fp32",)
_TOKENS = 512
# The certificate's longest prompt is 128 tokens, or 64 beyond the attention window, and 32 steps follow.
_LEAST_TOKENS, _BEYOND_WINDOW = 192, 128
_LOWER_TIMEOUT_S = 7200.0
# What nearly all of a model's time goes into; in portable kernels it takes tens of times as long.
_HEAVY = ("linear", "addmm", "mm", "bmm", "convolution")


class ExecuTorchExporter:
    """Traces with torch.export, lowers to XNNPACK, and runs the result on ExecuTorch."""

    name = "executorch"
    requires = ("torch",)
    facts = FormatFacts(environments=(ENVIRONMENT,), environment=ENVIRONMENT.name, packages=("executorch",))

    def layer_type_formula(self, model_type: str) -> Callable[[int], str] | None:
        """None: the program is traced from layers that were built by ``layer_types``."""
        del model_type
        return None

    def check_precision(self, precision: str) -> None:
        """Refuse weights that are not float32; a caller may ask before it spends time on a plan.

        Raises:
            ConfigError: If ``precision`` is "fp16" or "bf16".
        """
        if precision not in _PRECISIONS:
            raise ConfigError(
                f"the weights are {precision}; programs are made and certified in float32 only, XNNPACK leaves part of "
                "a half-precision model to portable kernels; load the model with --dtype fp32"
            )

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write ``model.pte``, the plan and the manifest.

        Args:
            model: What to export.
            out_dir: Complete or untouched.
            options: ``max_tokens``: longest sequence, prompt and continuation together, by default 512 beyond the
                attention window or what the model has positions for; ``precision``: "fp32".

        Raises:
            ConfigError: If an option is unknown or wrong, or the weights are not float32.
            MissingDependencyError: If there is no ExecuTorch, here or in its environment.
            UnsupportedModelError: If the model has a state or an input that a program cannot hold.
            BackendError: If it cannot be traced or lowered, or XNNPACK took almost nothing of it.
            StorageError: If the disk is full; nothing is left under ``out_dir``.
        """
        from sglp_deploy.models import precision as precision_of

        _check_options(options)
        self.check_precision(precision_of(model.module))
        length = _max_tokens(options, model)
        interpreter = python()  # before the trace, which takes minutes
        with _io.staged_directory(Path(out_dir)) as folder:
            file = str((folder / MODEL_FILE).resolve())  # a worker runs in a folder of its own
            # Within the artifact's folder, so that it is on a disk with room and goes when the export fails.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                program = Path(scratch) / "traced.pt2"
                facts = _trace(model.module, length, program)
                with Worker(interpreter, WORKER, name="ExecuTorch") as worker:
                    lowered = worker.ask("lower", timeout_s=_LOWER_TIMEOUT_S, program=str(program.resolve()), out=file)
            check_delegation(lowered)
            with Worker(interpreter, WORKER, name="ExecuTorch") as worker:
                loaded = worker.ask("start", file=file, threads=None)
            model.plan.save(folder / PLAN_FILE)
            versions = lowered.pop("versions")
            write_manifest(
                folder,
                format=self.name,
                inputs=facts["inputs"],
                # A decoder's vocabulary is read off the program.
                outputs=facts["outputs"]
                or (TensorSpec("logits", "float32", (1, "kept", loaded["outputs"][0]["sizes"][-1])),),
                precision="fp32",
                weight_bytes=lowered["delegated_weight_bytes"] + lowered["portable_weight_bytes"],
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer=producer_versions("torch", "transformers")
                | {"executorch": versions["executorch"], "torch (lowering)": versions["torch"]},
                details={
                    "interface": facts["interface"],
                    "batch": "1; the runner gives rows one after another",
                    "max_tokens": length,
                    **facts["details"],
                    "program": {
                        kind: [described(tensor) for tensor in loaded[kind]] for kind in ("inputs", "outputs", "cache")
                    },
                    "xnnpack": lowered,
                },
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def open(self, artifact: ExportArtifact, **options: Any) -> ExecuTorchRunner | ExecuTorchForwardRunner:
        """A runner on "cpu" with ``threads``; it generates if the program has a cache."""
        checked = check_open_options(self.name, options)
        if artifact.details.get("interface") == "forward":
            return ExecuTorchForwardRunner(artifact, **checked)
        return ExecuTorchRunner(artifact, **checked)


def check_delegation(lowered: Mapping[str, Any]) -> None:
    """Refuse a program most of whose matrix products and convolutions would run in portable kernels.

    Args:
        lowered: ``delegated`` and ``portable``: how many operators of each name run in XNNPACK and outside of it.

    Raises:
        BackendError: Naming what was left over.
    """
    delegated = sum(lowered["delegated"].get(name, 0) for name in _HEAVY)
    left = {name: lowered["portable"][name] for name in _HEAVY if lowered["portable"].get(name)}
    if delegated > sum(left.values()):
        return
    names = ", ".join(f"{count} {name}" for name, count in left.items()) or "everything"
    raise BackendError(
        f"silent fallback: XNNPACK took {delegated} of this model's {delegated + sum(left.values())} matrix products "
        f"and convolutions; {names} would run in ExecuTorch's portable kernels, tens of times slower; export it to "
        "onnx or openvino"
    )


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise unknown_name("option of exporter 'executorch'", name, _OPTIONS)
    if options.get("precision") not in (None, *_PRECISIONS):
        raise ConfigError(
            f"precision={options['precision']!r} is not offered; programs are certified in fp32 only; leave it out"
        )


def _max_tokens(options: Mapping[str, Any], model: CompressedModel) -> int | None:
    """Longest sequence the program will have room for; None for a model that takes no tokens."""
    from sglp_deploy.models.samples import attention_window, main_input, most_tokens

    given = options.get("max_tokens")
    module: Any = model.module
    if main_input(module) != "input_ids":
        if given is not None:
            raise ConfigError(
                f"max_tokens={given!r} was given for {type(module).__name__}, which takes no tokens; leave it out"
            )
        return None
    window = attention_window(module.config) or 0
    most = most_tokens(module)
    if given is None:
        return min(most, window + _TOKENS)
    least = min(most, max(_LEAST_TOKENS, window + _BEYOND_WINDOW if window else 0))
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        raise ConfigError(
            f"max_tokens={given!r} cannot be used; the model has {most} positions, and its certificate needs room for "
            f"{least}; pass a whole number from {least} to {most}"
        )
    return given


def _trace(module: nn.Module, length: int | None, program: Path) -> dict[str, Any]:
    """Write the traced program; its interface, inputs and outputs as the manifest holds them."""
    import torch

    from sglp_deploy.models.samples import generates, is_encoder_decoder
    from sglp_exporters.executorch import tracing as tracing

    if is_encoder_decoder(module):
        raise UnsupportedModelError(
            f"{type(module).__name__} is an encoder-decoder; a program for one sequence has no place for two; export "
            "it to onnx or openvino"
        )
    if generates(module):
        traced, sizes = tracing.trace_decoder(cast("PreTrainedModel", module), length or 0)
        torch.export.save(traced, program)
        details = {
            "inputs": {
                "input_ids": "int64 (1, n)",
                "cache_position": "int64 (n): where each token stands, from 0",
                "logits_to_keep": "int64 (k): positions among the n whose logits are wanted",
            },
            "caching_layers": len(sizes),
        }
        # The cache is no input: it lies in the program, and `program.cache` lists it.
        return {"interface": "decoder", "inputs": (), "outputs": (), "details": details}
    traced, inputs, output = tracing.trace_forward(module, length or 0)
    torch.export.save(traced, program)

    def spec(name: str, value: torch.Tensor, *, tokens: bool) -> TensorSpec:
        shape = ("batch", "sequence", *value.shape[2:]) if tokens else ("batch", *value.shape[1:])
        return TensorSpec(name, str(value.dtype).removeprefix("torch."), shape)

    with torch.no_grad():
        value = traced.module()(*inputs.values())
    longer = length is not None and value.ndim == 3 and value.shape[1] == inputs["input_ids"].shape[1]
    return {
        "interface": "forward",
        "inputs": tuple(spec(name, tensor, tokens=length is not None) for name, tensor in inputs.items()),
        "outputs": (spec(output, value, tokens=longer),),
        "details": {},
    }
