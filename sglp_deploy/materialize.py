"""Build the smaller model a plan describes, and write it as a checkpoint every other tool loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglp_deploy import _io
from sglp_deploy.artifact import PLAN_FILE
from sglp_deploy.errors import ArtifactError, PlanError, UnsupportedModelError
from sglp_deploy.models import FAMILIES, LayerStack, ModelSource, adapter_for, layer_stack, quiet_libraries
from sglp_deploy.models.proof import check_rebuild, prove
from sglp_deploy.models.settings import check_settings
from sglp_deploy.models.side_files import copy_side_files, folder_of
from sglp_deploy.models.transformers.earlier import TOKENIZER_SETTINGS, name_tokenizer_as_earlier
from sglp_deploy.overlay import Overlay, stored_tensors
from sglp_deploy.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Configurations work these out of the depth themselves.
_FOLLOW_DEPTH = {"stage_names", "out_features", "out_indices"}


@dataclass(frozen=True)
class CompressedModel:
    """A pruned model in memory; its tensors are shared with the model it came from, but for those of an overlay.

    Attributes:
        module: The smaller model, in evaluation mode.
        plan: The plan it realises.
        source: The model before pruning, and where the plan's overlay lay.
        tokenizer: Travels along into checkpoints; None when the model has none.
    """

    module: nn.Module
    plan: PruningPlan
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if self.stack.n_layers != len(self.plan.keep):
            raise ValueError(f"module has {self.stack.n_layers} layers, the plan keeps {len(self.plan.keep)}")

    @property
    def n_layers(self) -> int:
        """Layers that were kept."""
        return len(self.plan.keep)

    @property
    def stack(self) -> LayerStack:
        """The kept layers."""
        return layer_stack(self.module, self.plan.stack)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def materialize(
    module: nn.Module,
    plan: PruningPlan,
    source: ModelSource,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CompressedModel:
    """Realise ``plan`` on ``module`` without touching it: no weight is copied, no layer of the original is altered.

    A plan that changes weights needs its overlay at hand.  Its tensors take the place of the model's in the kept layers
    and outside the layers; those of removed layers are ignored.

    A family whose facts are not declared is let through only when a model rebuilt from the new configuration computes
    what the original computes with the removed layers passed over.

    Args:
        module: The unpruned model.
        plan: Which layers to keep.
        source: Identity of ``module``; the plan must be for it.
        tokenizer: Kept beside the model.

    Raises:
        PlanError: If the plan was made for another model, or its overlay is not at hand or does not fit the model.
        UnsupportedModelError: If no adapter knows the model, a layer to remove must stay, the proof fails, or weights
            of one layer would change where all layers are one module.
        ArtifactError: If a kept layer's settings and the new configuration disagree, which is a bug; or if the overlay
            is damaged or belongs to another plan.
    """
    stack = layer_stack(module, plan.stack)
    plan.check_model(source.fingerprint, stack.n_layers)
    stack.check_removable(plan.drop)
    overlay = plan.require_weights()
    if overlay is not None:
        _check_overlay(overlay, module, stack)
    pruned = select_layers(module, plan.keep, plan.stack)
    if overlay is not None:
        put_overlay(pruned, overlay, module, [stack.names[index] for index in plan.drop])
        if overlay.path is not None:
            source = replace(source, overlay_file=str(overlay.path))
    changes = adapter_for(module).changes(module, stack, plan.keep)
    _check_configuration(module, pruned, [change.entry for change in changes])
    config: Any = getattr(module, "config", None)
    if plan.drop and adapter_for(module).name == "transformers":
        if config.model_type not in FAMILIES:  # first: of what nobody declared, a difference is no bug
            prove(module, pruned, stack, plan.keep, overlay)
        check_rebuild(pruned, plan.stack)
    return CompressedModel(pruned, plan, source, tokenizer)


def put_overlay(pruned: nn.Module, overlay: Overlay, module: nn.Module, removed: Sequence[str]) -> None:
    """Give ``pruned`` new parameters with the overlay's values, in place of those it shares with ``module``.

    A tensor's place in the pruned model is where the tensor lies now that has its name in ``module``.  So layers are
    followed to their new numbers in every library, whatever its containers hold beside layers, and what is tied stays
    tied: one new parameter under all its names.

    Args:
        pruned: Made of ``module``; altered.
        overlay: Fits ``module``.
        module: The unpruned model.
        removed: Names of the removed layers; the overlay's tensors of these are ignored.

    Raises:
        PlanError: If a tensor lies nowhere in the pruned model although its layer was kept.
    """
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in stored_tensors(pruned).items():
        places.setdefault(_memory(tensor), []).append(name)
    there = stored_tensors(module)
    for name, values in overlay.tensors.items():
        found = places.get(_memory(there[name]), [])
        if not found and not any(name.startswith(f"{layer}.") for layer in removed):
            raise PlanError(
                f"the overlay changes {name}, which the pruned model does not take over as it is; what depends on the "
                "kept layers cannot be changed by an overlay; make the overlay again without it"
            )
        old, new = there[name], values.clone().to(there[name].device)  # training it must not change the overlay
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for place in found:
            owner, _, leaf = place.rpartition(".")
            setattr(pruned.get_submodule(owner), leaf, new)


def _check_overlay(overlay: Overlay, module: nn.Module, stack: LayerStack) -> None:
    """Refuse an overlay that ``module`` cannot take.

    Raises:
        PlanError: If a tensor does not fit, or tied names are given different values.
        UnsupportedModelError: If the layers are one module.
    """
    if stack.shares_one_module:
        raise UnsupportedModelError(
            f"the layers of {type(module).__name__} are one module run {stack.n_layers} times; an overlay would change "
            "all of them at once; use a plan without one"
        )
    overlay.check(module)
    there = stored_tensors(module)
    objects: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
    for name, tensor in there.items():
        if tensor.is_meta:
            raise PlanError(f"{name} of the model is not in memory; an overlay cannot take its place; load it whole")
        other, same = objects.setdefault(_memory(tensor), (name, tensor))
        if same is not tensor and tensor.numel() and {name, other} & set(overlay.tensors):
            raise PlanError(
                f"{other} and {name} of the model are two parameters in one memory; an overlay of one would change "
                "both in one place and not in another; tie them by assigning one parameter to both"
            )
    first: dict[tuple[Any, ...], str] = {}
    for name, values in overlay.tensors.items():
        other = first.setdefault(_memory(there[name]), name)
        if not torch.equal(values, overlay.tensors[other]):
            raise PlanError(
                f"the overlay gives {other} and {name} different values; the model has one tensor under both names, so "
                "only one could hold; give one of the two, or equal values"
            )


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's values lie: equal for tensors that are one and the same, whatever object they are."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def with_config_changes(plan: PruningPlan, module: nn.Module, stack: str | None = None) -> PruningPlan:
    """``plan`` with the stack it counts in and what it changes in the configuration, for a person to review.

    Args:
        plan: A plan for ``module``.
        module: The unpruned model.
        stack: Which stack, for a model that has several; the first when omitted.
    """
    chosen = layer_stack(module, stack)
    changes = adapter_for(module).changes(module, chosen, plan.keep)
    path = None if chosen.path == layer_stack(module).path else chosen.path
    return replace(plan, stack=path, config_changes=tuple(change.to_json() for change in changes))


def _check_configuration(module: nn.Module, pruned: nn.Module, entries: Sequence[str]) -> None:
    """Refuse a pruned model whose configuration differs in more than the entries that were meant to change.

    Raises:
        ArtifactError: Naming the first such entry.
    """
    before, after = (dict(_entries(adapter_for(module).facts(each))) for each in (module, pruned))
    for name in sorted(before.keys() | after.keys()):
        meant = name in _FOLLOW_DEPTH or any(name == entry or name.startswith(f"{entry}.") for entry in entries)
        if not meant and before.get(name) != after.get(name):
            raise ArtifactError(
                f"pruning changed {name} of the configuration from {before.get(name)!r} to {after.get(name)!r}; it has "
                "nothing to do with layers; report this as a bug"
            )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are of one type and shape and hold the same bits; NaN is then equal to itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(first, second)


def _entries(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested settings."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def select_layers(module: nn.Module, keep: Sequence[int], stack: str | None = None) -> nn.Module:
    """A model made of the layers ``keep`` of ``module``, in that order, sharing every tensor with it.

    Args:
        module: The model to take layers from.
        keep: Old indices; a repeated index gives two layers with the same weights.
        stack: Which stack, for a model that has several; the first when omitted.
    """
    return adapter_for(module).select(module, layer_stack(module, stack), keep)


def save_checkpoint(model: CompressedModel, out_dir: str | Path) -> Path:
    """Write ``model`` as a checkpoint its own library loads, with tokenizer, generation config and plan.

    The folder is complete or absent.  Before it gets its name it is loaded again and every tensor compared bit for
    bit, and every setting of every layer, so a checkpoint that exists is one that loads and means the same.

    Raises:
        ConfigError: If the folder exists and holds what we did not write.
        StorageError: If the disk is full or the folder cannot be written.
        ArtifactError: If what was written does not load back bit-exactly.
    """
    out = Path(out_dir)
    with _io.staged_directory(out) as folder:
        write_checkpoint_files(model, folder)
        _io.write_file_list(folder)
    return out


def write_checkpoint_files(model: CompressedModel, folder: Path) -> Mapping[str, str]:
    """Fill ``folder`` with the checkpoint and check that it loads back; for exporters that stage their own folder.

    Returns:
        Why files that lie beside the unpruned model's weights do not lie here, by name.
    """
    adapter_for(model.module).save(model.module, folder)
    if model.tokenizer is not None:
        with quiet_libraries():
            model.tokenizer.save_pretrained(folder)
    beside = folder_of(model.source, model.module)
    left = copy_side_files(beside, folder, model.plan.n_layers, model.tokenizer) if beside is not None else {}
    if (folder / TOKENIZER_SETTINGS).is_file():
        name_tokenizer_as_earlier(folder / TOKENIZER_SETTINGS)
    for file in folder.rglob("*"):
        if file.is_file():  # some tokenizers have a folder of chat templates
            # safetensors writes through a private temporary file; the folder is as the user's mask has it.
            file.chmod(folder.stat().st_mode & 0o666)
    model.plan.save(folder / PLAN_FILE)
    check_reload(model, folder)
    return left


def check_reload(model: CompressedModel, folder: Path) -> None:
    """Load the checkpoint in ``folder`` with its own library and compare it with ``model``: tensors and settings.

    Raises:
        ArtifactError: If it does not load cleanly, an entry of the configuration or a bit of a tensor differs, or a
            layer is rebuilt otherwise.
    """
    adapter = adapter_for(model.module)
    # Code that came with the model is run by no one but the caller, who has it in memory already.
    load_as = getattr(adapter, "load_as", None)
    again = adapter.load(folder) if load_as is None else load_as(folder, model.module)
    read, wanted = (dict(_entries(adapter.facts(module))) for module in (again, model.module))
    for name in sorted(read.keys() | wanted.keys()):
        # Some model types are another one's by another name, and are written as that.
        if name == "model_type" and type(again) is type(model.module):
            continue
        # An entry that was taken away (it contradicted the kept layers) comes back as the library's default.
        if wanted.get(name) is not None and read.get(name) != wanted[name]:
            raise ArtifactError(
                f"{name} of the configuration changed on the way to disk from {wanted[name]!r} to "
                f"{read.get(name)!r}; the checkpoint would mean something else; report this as a bug"
            )
    written, meant = again.state_dict(), model.module.state_dict()
    different = sorted(
        name
        for name in meant.keys() | written.keys()
        if name not in meant or name not in written or not same_bits(written[name], meant[name])
    )
    if different:
        raise ArtifactError(
            f"{len(different)} tensors changed on the way to disk, first {different[0]}; the checkpoint would compute "
            "something else; report this as a bug"
        )
    check_settings(layer_stack(again, model.plan.stack).layers, model.stack.layers)
