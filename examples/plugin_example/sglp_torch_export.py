"""The ``torch-export`` format: a decoder as one ``.pt2`` file that runs without transformers and the model's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sglp_deploy.artifact import (
    PLAN_FILE,
    ExportArtifact,
    TensorSpec,
    producer_versions,
    staged_artifact,
    write_manifest,
)
from sglp_deploy.errors import BackendError, ConfigError, UnsupportedModelError
from sglp_deploy.materialize import CompressedModel
from sglp_deploy.models import precision, quiet_libraries
from sglp_deploy.models.samples import generates
from sglp_deploy.parity.cache import key_value_sizes
from sglp_deploy.protocols import FormatFacts, check_open_options

FILE = "model.pt2"
TOKENS = (("input_ids", "new"), ("attention_mask", "new"), ("position_ids", "new"), ("past_mask", "past"))
Cache = list[torch.Tensor]  # key and value of layer 0, of layer 1, ...


class TorchExportExporter:
    """Exports decoders with a key-value cache; one graph serves prefill and decode."""

    name = "torch-export"
    requires = ("torch", "transformers")
    facts = FormatFacts(packages=("torch",))

    def layer_type_formula(self, model_type: str) -> None:
        """None: the graph is traced from layers that were built by ``layer_types``."""

    def export(self, model: CompressedModel, out_dir: Path, **options: Any) -> ExportArtifact:
        """Write the program, the plan and the manifest."""
        if options:
            raise ConfigError(f"exporter {self.name!r} does not know {', '.join(sorted(options))}; leave it out")
        module: Any = model.module
        past, present = cache_specs(module, "past_key_values", "past"), cache_specs(module, "present", "all")
        words = module.config.get_text_config().vocab_size
        program = trace(module, past)
        with staged_artifact(out_dir) as folder:
            torch.export.save(program, folder / FILE)
            model.plan.save(folder / PLAN_FILE)
            write_manifest(
                folder,
                format=self.name,
                inputs=(*(TensorSpec(name, "int64", ("batch", length)) for name, length in TOKENS), *past),
                outputs=(TensorSpec("logits", past[0].dtype, ("batch", "new", words)), *present),
                precision=precision(module),
                weight_bytes=sum(weight.numel() * weight.element_size() for weight in module.parameters()),
                n_layers=model.n_layers,
                plan_digest=model.plan.digest(),
                model=model.source.to_json(),
                producer=producer_versions("sglp-torch-export", "torch", "transformers"),
                details={"runner": f"torch.export program, torch {torch.__version__}"},
            )
        return ExportArtifact.load(out_dir, check_files=False)

    def open(self, artifact: ExportArtifact, **options: Any) -> ProgramRunner:
        """A runner on the CPU with ``threads``."""
        return ProgramRunner(artifact, **check_open_options(self.name, options))


def cache_specs(module: Any, prefix: str, length: str) -> list[TensorSpec]:
    """Keys and values of every layer, under the names that ``verify`` compares with what the torch model keeps."""
    sizes = key_value_sizes(module) if generates(module) else "it is no decoder language model"
    if isinstance(sizes, str):
        raise UnsupportedModelError(f"{type(module).__name__} has no key-value cache; {sizes}; export it to onnx")
    dtype = str(module.dtype).removeprefix("torch.")
    return [
        TensorSpec(f"{prefix}.{layer}.{part}", dtype, ("batch", size.heads, length, width))
        for layer, size in enumerate(sizes)
        for part, width in (("key", size.key_size), ("value", size.value_size))
    ]


def zero_cache(specs: Sequence[TensorSpec], batch: int, length: int) -> Cache:
    """A cache of ``length`` tokens that are all zero."""
    shapes = [(batch, int(spec.shape[1]), length, int(spec.shape[3])) for spec in specs]
    return [torch.zeros(shape, dtype=getattr(torch, spec.dtype)) for shape, spec in zip(shapes, specs, strict=True)]


class Step(nn.Module):
    """A decoder as a function of tensors: tokens and the cache in, logits and the longer cache out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past_mask: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        # Of full length for every layer, sliding ones too: the mask applies the window.
        cache.layers = [DynamicLayer() for _ in past[::2]]
        for index, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, index)
        mask = torch.cat([past_mask, mask], dim=1)
        output = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def trace(module: nn.Module, past: Sequence[TensorSpec]) -> torch.export.ExportedProgram:
    """The program of ``module``; batch, new tokens and cache length stay open.

    The mask comes in two parts because torch lets an open size be 0 or 1 later, but not a sum of two of them.
    """
    batch, old, new = 2, 5, 3  # 0 and 1 would be taken for constants
    mask = torch.ones(batch, old + new, dtype=torch.int64)
    mask[0, :2] = 0  # without padding the mask would be traced away
    ids = torch.arange(batch * new).reshape(batch, new)
    inputs = (ids, mask[:, old:], mask.cumsum(-1)[:, old:] - 1, mask[:, :old], zero_cache(past, batch, old))
    both, cache = (dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in ((0, 1), (0, 2)))
    shapes = (both, both, both, both, [cache for _ in past])
    try:
        with torch.no_grad(), quiet_libraries():
            return torch.export.export(Step(module), inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise BackendError(
            f"torch.export cannot trace {type(module).__name__}; {type(error).__name__}; run again with -v to see why"
        ) from error


class ProgramRunner:
    """Runs a program on the CPU and holds its cache between the steps."""

    def __init__(self, artifact: ExportArtifact, device: str = "cpu", threads: int | None = None) -> None:
        if device != "cpu":
            raise ConfigError(f"the torch-export runner is for the CPU, not for {device!r}; pass --device cpu")
        self._file = artifact.path / FILE
        self._past = [spec for spec in artifact.inputs if spec.name.startswith("past_key_values.")]
        self._threads = threads

    def __enter__(self) -> ProgramRunner:
        """Load the program."""
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads or self._threads_before)
        self._mask: torch.Tensor | None = None
        self._cache: Cache = []
        # Without guards, which hold the tracer's guess that no size is 0 or 1: a prefill finds the cache empty.
        self._program: Any = torch.export.load(self._file).module(check_guards=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the program and its cache."""
        self._program, self._mask, self._cache = None, None, []
        torch.set_num_threads(self._threads_before)

    def forward(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Logits of every position of ``input_ids``."""
        return {"logits": self.prefill(inputs["input_ids"], inputs.get("attention_mask"), all_positions=True)}

    def synchronize(self) -> None:
        """On the CPU a call returns when its result exists."""

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        all_positions: bool = False,
    ) -> NDArray[np.float32]:
        """Start new sequences; padding is on the left."""
        ids = torch.as_tensor(input_ids)
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask)
        self._mask, self._cache = mask[:, :0], zero_cache(self._past, len(ids), 0)
        logits = self._run(ids, mask)
        return logits if all_positions else logits[:, -1]

    def decode(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """One more token for every sequence."""
        ids = torch.as_tensor(token_ids).reshape(-1, 1)
        return self._run(ids, torch.ones_like(ids))[:, -1]

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> NDArray[np.float32]:
        if self._mask is None:
            raise BackendError("decode was called before prefill; there is no cache to continue; call prefill first")
        past_mask, self._mask = self._mask, torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, past_mask.shape[1] :]
        with torch.inference_mode():
            logits, self._cache = self._program(ids, mask, positions, past_mask, self._cache)
        array: NDArray[np.float32] = logits.float().numpy()
        return array
