"""What every other stage needs of a model: its ordered layers, what pruning changes in its configuration, its origin.

An :class:`Adapter` stands for one library of models (transformers, timm, torchvision).  A third party adds one under
the entry-point group ``sglp_deploy.adapters``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerStack:
    """The ordered layers of one model, or of one side of it, that depth pruning chooses from.

    Attributes:
        path: What the stack is called in plans: the module list's qualified name, for example ``"model.layers"``, or
            the common prefix of the lists of a model in stages.
        names: Qualified name of each layer (L); a name's last part is its place in its container.
        layers: The modules (L); shared with the model, not copies.  One module may stand for several layers (ALBERT).
        prunable: Whether each layer may be removed (L).
        pinned: Why a layer may not be removed, by layer.
        side: "encoder" or "decoder" of a model that has both, else "layers".
    """

    path: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    prunable: tuple[bool, ...]
    pinned: Mapping[int, str] = field(default_factory=dict)
    side: str = "layers"

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.layers) == len(self.prunable):
            raise ValueError("names, layers and prunable must have one entry per layer")

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def containers(self) -> tuple[str, ...]:
        """Qualified names of the module lists the layers lie in, in order; several for a model in stages."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.names))

    @property
    def shares_one_module(self) -> bool:
        """Whether several layers are one and the same module, run in a loop (ALBERT)."""
        return len({id(layer) for layer in self.layers}) < len(self.layers)

    def check_distinct(self, model: str) -> None:
        """Refuse to measure layers that are one module, of a model of the class called ``model``.

        Raises:
            UnsupportedModelError: Saying how to plan without measuring.
        """
        if self.shares_one_module:
            raise UnsupportedModelError(
                f"the layers of {model} are one module run {self.n_layers} times; there is nothing to choose between; "
                "name the layers yourself: plan MODEL --drop-layers 2,5 (Compressor.plan_by_hand)"
            )

    def check_removable(self, drop: Sequence[int]) -> None:
        """Refuse to remove a pinned layer.

        A stack without any layer that may go is not wrong in itself: what is left of a model may be just those.

        Raises:
            UnsupportedModelError: Naming the first such layer and why it must stay.
        """
        if drop and not any(self.prunable):
            reason = next(iter(self.pinned.values()), "")
            raise UnsupportedModelError(
                f"none of the {len(self.names)} layers under {self.path} can be removed{'; ' if reason else ''}{reason}"
            )
        for index in drop:
            if not self.prunable[index]:
                why = self.pinned.get(index, "its output has another shape than its input")
                raise UnsupportedModelError(
                    f"layer {index} ({self.names[index]}) cannot be removed; {why}; keep it and remove another one"
                )


@dataclass(frozen=True)
class ConfigChange:
    """One configuration entry that removing layers changes, or that a person should look at.

    Attributes:
        entry: Its name, with dots where it lies in a part of the configuration.
        before: JSON value for all layers.
        after: JSON value for the kept layers.
        rule: Why it becomes that, in words; an entry left as it is has equal values and says why it was left.
    """

    entry: str
    before: Any
    after: Any
    rule: str

    def to_json(self) -> dict[str, Any]:
        """The form kept in plans."""
        return {"entry": self.entry, "before": self.before, "after": self.after, "rule": self.rule}


@runtime_checkable
class Adapter(Protocol):
    """One library of models: finds the layers, removes some, writes and reads what is left.

    Every method that takes a module may raise :class:`sglp_deploy.errors.UnsupportedModelError`, which says what was
    looked for.
    """

    name: str

    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` comes from this library."""
        ...

    def stacks(self, module: nn.Module) -> tuple[LayerStack, ...]:
        """The stacks of ``module``, the one to prune by default first; never empty."""
        ...

    def changes(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> tuple[ConfigChange, ...]:
        """What removing the other layers changes in the model's configuration, unknown entries included."""
        ...

    def kinds(self, module: nn.Module, stack: LayerStack) -> tuple[tuple[Hashable, ...], ...]:
        """By stage, what each layer is by its place (local or global attention, ...): equal for one kind."""
        ...

    def select(self, module: nn.Module, stack: LayerStack, keep: Sequence[int]) -> nn.Module:
        """A model of the layers ``keep`` in evaluation mode that shares every tensor with ``module``."""
        ...

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """The configuration as JSON values, without entries that a save or a load may change; for fingerprints."""
        ...

    def owns(self, folder: Path) -> bool:
        """Whether ``folder`` is a checkpoint of this library; looks at file names and small files only."""
        ...

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write ``module`` into ``folder`` so that its own library loads it, weights as safetensors."""
        ...

    def load(self, folder: Path) -> nn.Module:
        """Read a folder written by :meth:`save` with plain calls of the library, in evaluation mode on the CPU.

        Raises:
            ArtifactError: If a tensor is missing, left over or of another shape.
        """
        ...


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and enough to tell it from another one.

    Attributes:
        id: Path or hub identifier as the user gave it.
        fingerprint: Digest over configuration and weights; see :func:`sglp_deploy.models.loading.fingerprint`.
        config_digest: Digest of the configuration alone.
        gguf_file: File name inside ``id``'s folder when the weights came from GGUF.
        overlay_file: Where the overlay lay that was put into this model's pruned one; like ``id`` a place and no part
            of the identity, and absent from the JSON where there was none.
    """

    id: str
    fingerprint: str
    config_digest: str
    gguf_file: str | None = None
    overlay_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form kept in plans and manifests."""
        value = {
            "id": self.id,
            "fingerprint": self.fingerprint,
            "config_digest": self.config_digest,
            "gguf_file": self.gguf_file,
        }
        return value if self.overlay_file is None else value | {"overlay_file": self.overlay_file}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSource:
        """Inverse of :meth:`to_json`."""
        places = value.get("gguf_file"), value.get("overlay_file")
        return cls(value["id"], value["fingerprint"], value["config_digest"], *places)
