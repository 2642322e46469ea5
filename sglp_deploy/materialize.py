"""Build the smaller model a plan describes, and write it as a checkpoint every other tool loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglp_deploy import _io
from sglp_deploy.adapters import LayerStack, ModelSource, layer_stack, pruned_config, quiet_libraries
from sglp_deploy.artifact import PLAN_FILE
from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CompressedModel:
    """A pruned model in memory; its tensors are shared with the model it came from.

    Attributes:
        module: The smaller model, in evaluation mode.
        plan: The plan it realises.
        source: The model before pruning.
        tokenizer: Travels along into checkpoints; None when the model has none.
    """

    module: PreTrainedModel
    plan: PruningPlan
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        stack = layer_stack(self.module)
        if stack.n_layers != len(self.plan.keep):
            raise ValueError(f"module has {stack.n_layers} layers, the plan keeps {len(self.plan.keep)}")

    @property
    def n_layers(self) -> int:
        """Layers that were kept."""
        return len(self.plan.keep)

    @property
    def stack(self) -> LayerStack:
        """The kept layers."""
        return layer_stack(self.module)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def materialize(
    module: PreTrainedModel,
    plan: PruningPlan,
    source: ModelSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompressedModel:
    """Realise ``plan`` on ``module`` without touching it: no weight is copied, no layer of the original is altered.

    Args:
        module: The unpruned model.
        plan: Which layers to keep.
        source: Identity of ``module``; the plan must be for it.
        tokenizer: Kept beside the model.

    Raises:
        PlanError: If the plan was made for another model.
        UnsupportedModelError: If the model's family is not supported.
    """
    stack = layer_stack(module)
    plan.check_model(source.fingerprint, stack.n_layers)
    return CompressedModel(select_layers(module, plan.keep), plan, source, tokenizer)


def select_layers(module: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A model made of the layers ``keep`` of ``module``, in that order, sharing every tensor with it.

    The modules are copied (a layer holds its own index, and that must change), the tensors are not.

    Args:
        module: The model to take layers from.
        keep: Old indices; a repeated index gives two layers with the same weights.
    """
    stack = layer_stack(module)
    config = pruned_config(module.config, keep)
    # deepcopy consults this memo first: tensors map to themselves, and every reference to the old configuration,
    # wherever in the tree it sits, becomes the new one.
    shared: dict[int, Any] = {id(module.config): config}
    for tensor in (*module.parameters(), *module.buffers()):
        shared[id(tensor)] = tensor
    layers = [_copy_layer(stack.layers[old], shared, new) for new, old in enumerate(keep)]
    # The old layers are left out of the copy of the rest; a fresh list takes their place.
    shared[id(module.get_submodule(stack.path))] = torch.nn.ModuleList(layers)
    pruned: PreTrainedModel = copy.deepcopy(module, shared)
    return pruned.eval()


def _copy_layer(layer: torch.nn.Module, shared: dict[int, Any], index: int) -> torch.nn.Module:
    # A memo of its own for each layer: a layer that appears twice must be copied twice.
    new = copy.deepcopy(layer, dict(shared))
    for part in new.modules():
        # transformers keeps layer_idx inside each attention; renumber, or the KV cache is addressed past its end.
        if isinstance(getattr(part, "layer_idx", None), int):
            part.layer_idx = index  # type: ignore[assignment]  # Module.__setattr__ is typed for tensors and modules
    return new


def save_checkpoint(model: CompressedModel, out_dir: str | Path) -> Path:
    """Write ``model`` as an ordinary Hugging Face folder with tokenizer, chat template, generation config and plan.

    The folder is complete or absent.  Before it gets its name it is loaded again and every tensor compared bit for
    bit, so a checkpoint that exists is one that loads.

    Raises:
        StorageError: If the disk is full or the folder cannot be written.
        ArtifactError: If what was written does not load back bit-exactly.
    """
    out = Path(out_dir)
    with _io.staged_directory(out) as folder:
        write_checkpoint_files(model, folder)
    return out


def write_checkpoint_files(model: CompressedModel, folder: Path) -> None:
    """Fill ``folder`` with the checkpoint and check that it loads back; for exporters that stage their own folder."""
    config = model.module.config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        raise UnsupportedModelError(
            "the model's weights are quantised; slicing them into a plain checkpoint would mislabel them; "
            "load an unquantised checkpoint"
        )
    with quiet_libraries():
        model.module.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes through a private temporary file
    model.plan.save(folder / PLAN_FILE)
    _check_reload(model, folder)


def _check_reload(model: CompressedModel, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        again, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    faults = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if faults:
        raise ArtifactError(f"the checkpoint does not load cleanly; {json.dumps(faults)}; report this as a bug")
    written, meant = again.state_dict(), model.module.state_dict()
    different = sorted(
        name
        for name in meant.keys() | written.keys()
        if name not in meant
        or name not in written
        or written[name].dtype != meant[name].dtype
        or not torch.equal(written[name], meant[name].to(written[name].device))
    )
    if different:
        raise ArtifactError(
            f"{len(different)} tensors changed on the way to disk, first {different[0]}; the checkpoint would compute "
            "something else; report this as a bug"
        )
