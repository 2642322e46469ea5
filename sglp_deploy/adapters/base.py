"""The two values every other stage needs of a model: its ordered layers and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglp_deploy.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerStack:
    """The ordered, removable layers of one model.

    Attributes:
        path: Qualified name of the module list, for example ``"model.layers"``.
        names: Qualified name of each layer (L).
        layers: The modules (L); shared with the model, not copies.
        prunable: Whether each layer may be removed (L).
    """

    path: str
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    prunable: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.layers) == len(self.prunable):
            raise ValueError("names, layers and prunable must have one entry per layer")
        if not any(self.prunable):
            raise UnsupportedModelError(f"none of the {len(self.names)} layers under {self.path} can be removed")

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and enough to tell it from another one.

    Attributes:
        id: Path or hub identifier as the user gave it.
        fingerprint: Digest over configuration and weights; see :func:`sglp_deploy.adapters.loading.fingerprint`.
        config_digest: Digest of the configuration alone.
        gguf_file: File name inside ``id``'s folder when the weights came from GGUF.
    """

    id: str
    fingerprint: str
    config_digest: str
    gguf_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The form kept in plans and manifests."""
        return {
            "id": self.id,
            "fingerprint": self.fingerprint,
            "config_digest": self.config_digest,
            "gguf_file": self.gguf_file,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSource:
        """Inverse of :meth:`to_json`."""
        return cls(value["id"], value["fingerprint"], value["config_digest"], value.get("gguf_file"))
