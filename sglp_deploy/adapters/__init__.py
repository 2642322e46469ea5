"""What a model family looks like: where its layers are and which configuration entries belong to one layer."""

from __future__ import annotations

from sglp_deploy.adapters.base import LayerStack, ModelSource
from sglp_deploy.adapters.decoder import SUPPORTED_MODEL_TYPES, layer_stack, pruned_config
from sglp_deploy.adapters.loading import LoadedModel, fingerprint, load_model, precision
from sglp_deploy.adapters.quiet import quiet_libraries

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "LayerStack",
    "LoadedModel",
    "ModelSource",
    "fingerprint",
    "layer_stack",
    "load_model",
    "precision",
    "pruned_config",
    "quiet_libraries",
]
