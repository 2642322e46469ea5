"""The pruned model as it is trained: parameters of its own in float32, under their names in the unpruned model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglp_deploy.errors import UnsupportedModelError
from sglp_deploy.healing.lora import low_rank, merge
from sglp_deploy.models import layer_stack

if TYPE_CHECKING:
    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.materialize import CompressedModel
    from sglp_deploy.models import LayerStack


@dataclass(frozen=True)
class Student:
    """A pruned model with parameters that are trained.

    Attributes:
        module: Computes; its other parameters are frozen.
        trained: What the optimizer changes, by name.
        names: Names of weights the training changes, to their names in the unpruned model.
        before: These weights before training, as they are stored.
        lora: Whether low-rank matrices are trained, which :meth:`changed` merges.
    """

    module: nn.Module
    trained: Mapping[str, nn.Parameter]
    names: Mapping[str, str]
    before: Mapping[str, torch.Tensor]
    lora: bool = False

    def changed(self) -> dict[str, torch.Tensor]:
        """The weights that differ from those before, in the type they are stored in, by name in the unpruned model.

        LoRA's matrices are merged first; training is over then.
        """
        if self.lora:
            merge(self.module)
        found = {}
        for name, old_name in self.names.items():
            old = self.before[name]
            new = self.module.get_parameter(name).detach().to(old.dtype)
            if not torch.equal(new, old):
                found[old_name] = new
        return found


def student_of(pruned: CompressedModel, dense: nn.Module, options: HealOptions) -> Student:
    """Make ``pruned`` trainable; the model it came from keeps its own parameters.

    All of its parameters become float32 copies: small steps would vanish in a coarser type.  Trained are those of the
    layers and of what stands outside them, embeddings and head excepted (unless ``options.embeddings``).  With
    ``options.lora`` the linear maps of the layers get low-rank matrices beside them, and only these are trained.

    Args:
        pruned: Altered.
        dense: The unpruned model.
        options: Which are trained.

    Raises:
        UnsupportedModelError: If the layers are one module, or LoRA finds no linear map in them.
        ConfigError: If LoRA is asked for and peft is missing.
    """
    stack = layer_stack(dense, pruned.plan.stack)
    module: Any = pruned.module
    if stack.shares_one_module:
        raise UnsupportedModelError(
            f"the layers of {type(module).__name__} are one module; healing one would change all; use the plan as it is"
        )
    before = {name: parameter.detach() for name, parameter in module.named_parameters()}
    spared = set() if options.embeddings else _embeddings(module)
    wanted = [name for name, one in module.named_parameters() if id(one) not in spared and one.is_floating_point()]
    _own_copies(module)
    names = _old_names(pruned, stack, wanted)
    there = {name: tensor.shape for name, tensor in dense.named_parameters(remove_duplicate=False)}
    # What pruning cuts (Gemma-3n's packed embeddings) has no place in an overlay.
    names = {name: old for name, old in names.items() if there.get(old) == before[name].shape}
    if options.lora:
        names, trained = low_rank(module, pruned.stack, names, rank=options.lora, seed=options.seed)
        return Student(module, trained, names, {name: before[name] for name in names}, lora=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    trained = {name: module.get_parameter(name) for name in names}
    return Student(module, trained, names, {name: before[name] for name in names})


def _embeddings(module: Any) -> set[int]:
    """Parameters of the input embeddings and of the head, tied or not."""
    owners = [module.get_input_embeddings(), module.get_output_embeddings()]
    owners += [one for one in module.modules() if isinstance(one, nn.Embedding)]
    return {id(parameter) for owner in owners if owner is not None for parameter in owner.parameters()}


def _own_copies(module: nn.Module) -> None:
    """Give ``module`` parameters of its own, in float32; what is tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if not old.is_floating_point():
            continue
        if id(old) not in made:
            made[id(old)] = nn.Parameter(old.detach().to(torch.float32, copy=True), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, made[id(old)])


def _old_names(pruned: CompressedModel, stack: LayerStack, names: list[str]) -> dict[str, str]:
    """Names in the unpruned model: layers are followed to their old numbers, what lies outside keeps its name."""
    found = {}
    for name in names:
        for new, old in enumerate(pruned.plan.keep):
            prefix = f"{pruned.stack.names[new]}."
            if name.startswith(prefix):
                found[name] = f"{stack.names[old]}.{name.removeprefix(prefix)}"
                break
        else:
            if not any(name.startswith(f"{container}.") for container in pruned.stack.containers):
                found[name] = name
    return found
