"""The adapter for transformers: any ``PreTrainedModel`` of a declared family, and others that prove themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, UnsupportedModelError
from sglp_deploy.models.base import ConfigChange, LayerStack
from sglp_deploy.models.quiet import quiet_libraries
from sglp_deploy.models.settings import renumber
from sglp_deploy.models.transformers.config import apply_changes, config_changes, layer_kinds
from sglp_deploy.models.transformers.discovery import find_stacks
from sglp_deploy.models.transformers.earlier import add_earlier_names
from sglp_deploy.models.transformers.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Entries that vary between two loads of the same model.
_VOLATILE_CONFIG = {"_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype"}
_OWN_CODE = "transformers_modules"  # where transformers puts code that came with a model
_GENERATION = "generation_config."


class TransformersAdapter:
    """See :class:`sglp_deploy.models.base.Adapter`."""

    name = "transformers"

    def matches(self, module: nn.Module) -> bool:
        """Whether it is a ``PreTrainedModel``."""
        from transformers import PreTrainedModel

        return isinstance(module, PreTrainedModel)

    def stacks(self, module: nn.Module) -> tuple[LayerStack, ...]:
        """See :func:`sglp_deploy.models.transformers.discovery.find_stacks`."""
        return find_stacks(cast("PreTrainedModel", module))

    def changes(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> tuple[ConfigChange, ...]:
        """See :func:`sglp_deploy.models.transformers.config.config_changes`; a family may declare more of its own."""
        config = cast("PreTrainedModel", module).config
        found = config_changes(config, keep, side=stack.side)
        more = FAMILIES.get(config.model_type, Family()).more_changes
        return found if more is None else (*found, *more(module, stack.side, keep))

    def kinds(self, module: nn.Module, stack: LayerStack) -> tuple[tuple[Hashable, ...], ...]:
        """See :func:`sglp_deploy.models.transformers.config.layer_kinds`."""
        return layer_kinds(cast("PreTrainedModel", module).config, stack.side)

    def select(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> nn.Module:
        """The modules are copied (a layer holds its own number, and that must change), the tensors are not.

        A repeated number in ``keep`` gives two layers with the same weights.
        """
        model = cast("PreTrainedModel", module)
        every = self.changes(module, stack, keep)
        changes = tuple(change for change in every if not change.entry.startswith(_GENERATION))
        # deepcopy consults this memo first: tensors map to themselves, and every reference to an old configuration,
        # wherever in the tree it sits, becomes the new one.
        shared: dict[int, Any] = {}
        config = copy.deepcopy(model.config, shared)
        apply_changes(config, changes)
        self._follow_copies(model, stack, changes, shared)
        for tensor in (*module.parameters(), *module.buffers()):
            shared[id(tensor)] = tensor
        if not stack.shares_one_module:
            for path, container in pruned_containers(module, stack, keep, shared).items():
                shared[id(module.get_submodule(path))] = container
        pruned: PreTrainedModel = copy.deepcopy(model, shared)
        family = FAMILIES.get(model.config.model_type, Family())
        if family.reset is not None:
            family.reset(pruned)
        if family.adjust is not None:
            family.adjust(pruned, stack.side, keep)
        for change in every:
            if change.entry.startswith(_GENERATION):
                name = change.entry.removeprefix(_GENERATION)
                if change.after is None:
                    delattr(pruned.generation_config, name)
                else:
                    setattr(pruned.generation_config, name, change.after)
        return cast(nn.Module, pruned.eval())

    @staticmethod
    def _follow_copies(
        model: PreTrainedModel, stack: LayerStack, changes: Sequence[ConfigChange], shared: dict[int, Any]
    ) -> None:
        """T5 gives encoder and decoder altered copies of the configuration; the count of layers must follow there."""
        from transformers import PretrainedConfig

        depth, count = stack.n_layers, next(c.after for c in changes) if changes else None
        known = {id(value) for value in _configs(model.config)}
        for path in _ancestors(stack.containers[0]):
            own = getattr(model.get_submodule(path), "config", None)
            if not isinstance(own, PretrainedConfig) or id(own) in known or id(own) in shared:
                continue
            new = copy.deepcopy(own, shared)
            name = own.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            if vars(own).get(name) == depth and isinstance(count, int):
                vars(new)[name] = count
            shared[id(own)] = new

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """See :func:`config_facts`."""
        return config_facts(cast("PreTrainedModel", module).config)

    def owns(self, folder: Path) -> bool:
        """Whether there is a config.json that names a ``model_type``."""
        try:
            config = _io.parse_json((folder / "config.json").read_text(encoding="utf-8"), ours=False)
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and "model_type" in config

    def save(self, module: nn.Module, folder: Path) -> None:
        """An ordinary Hugging Face folder.

        Raises:
            UnsupportedModelError: If the weights are quantised.
        """
        model = cast("PreTrainedModel", module)
        if getattr(model.config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                "the model's weights are quantised; slicing them into a plain checkpoint would mislabel them; "
                "load an unquantised checkpoint"
            )
        family = FAMILIES.get(model.config.model_type, Family())
        if family.reset is not None:
            family.reset(model)  # a folder is read back into a model that has not run yet, and compared
        own = getattr(model, "generation_config", None)
        file = folder / "generation_config.json"
        with quiet_libraries():
            try:
                if own is not None:
                    # transformers refuses to write settings it objects to; published models have such, and keep them.
                    model.generation_config = type(own)()
                model.save_pretrained(folder)
            finally:
                if own is not None:
                    model.generation_config = own
            if own is not None and file.is_file():
                own.to_json_file(file, use_diff=True, keys_to_pop=["compile_config"])
        add_earlier_names(folder / "config.json")

    def load(self, folder: Path) -> nn.Module:
        """With ``from_pretrained`` of the class the configuration names, and nothing custom."""
        import transformers

        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(folder)
        return self._load(folder, model_class(config))

    def load_as(self, folder: Path, module: nn.Module) -> nn.Module:
        """:meth:`load`, or with the class of ``module`` where that is code that came with a model and runs already."""
        if type(module).__module__.startswith(_OWN_CODE):
            return self._load(folder, type(module), config=type(cast("PreTrainedModel", module).config))
        return self.load(folder)

    @staticmethod
    def _load(folder: Path, loader: Any, config: Any = None) -> nn.Module:
        given = {} if config is None else {"config": config.from_pretrained(folder)}
        with quiet_libraries():
            again, report = loader.from_pretrained(
                folder, dtype="auto", output_loading_info=True, use_safetensors=True, **given
            )
        faults = {key: sorted(map(str, value)) for key, value in report.items() if value}
        if faults:
            raise ArtifactError(f"the checkpoint does not load cleanly; {json.dumps(faults)}; report this as a bug")
        return cast(nn.Module, again.eval())


def pruned_containers(
    module: nn.Module, stack: LayerStack, keep: Sequence[int], shared: dict[int, Any]
) -> dict[str, nn.Module]:
    """For each container of ``stack`` a new one of the same class with the kept layers, copied and renumbered.

    Children of a container that are no layers (a stem inside the same ``nn.Sequential``) keep their place.
    """
    members: dict[str, list[tuple[int, str]]] = {path: [] for path in stack.containers}
    for old, name in enumerate(stack.names):
        path, _, child = name.rpartition(".")
        members[path].append((old, child))
    containers = {}
    for path, layers in members.items():
        container = module.get_submodule(path)
        by_child = {child: old for old, child in layers}
        order: list[nn.Module | int] = [by_child.get(name, child) for name, child in container.named_children()]
        if len(stack.containers) == 1 and all(isinstance(entry, int) for entry in order):
            order = list(keep)  # an exporter may repeat a layer
        else:
            order = [entry for entry in order if not isinstance(entry, int) or entry in set(keep)]
        children = []
        for new, entry in enumerate(order):
            # A memo of its own for each layer: a layer that appears twice must be copied twice.
            layer = copy.deepcopy(stack.layers[entry] if isinstance(entry, int) else entry, dict(shared))
            if isinstance(entry, int):
                renumber(layer, entry, new)
            children.append(layer)
        containers[path] = _like(container, children)
    return containers


def _like(container: nn.Module, children: Sequence[nn.Module]) -> nn.Module:
    """A container of the same class and settings; children are numbered anew, as a rebuilt model numbers them."""
    empty: dict[int, Any] = {id(child): nn.Identity() for child in container.children()}
    new = copy.deepcopy(container, empty)
    for name in list(new._modules):
        del new._modules[name]
    for index, child in enumerate(children):
        new.add_module(str(index), child)
    return new


def config_facts(config: PretrainedConfig) -> dict[str, Any]:
    """The configuration as JSON values, without the entries that loading or saving a model may change."""
    # Through to_json_string: it turns every value (dtypes, enums) into plain JSON.
    value = json.loads(config.to_json_string(use_diff=False))
    return {key: item for key, item in value.items() if key not in _VOLATILE_CONFIG}


def model_class(config: PretrainedConfig) -> Any:
    """The class that plain transformers would use: the one the checkpoint names, else the causal one, else the base."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        # The name comes from a file: it may only choose among models.
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    found = [config]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            found += _configs(part)
    return found


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]
