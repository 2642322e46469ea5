"""What a model family looks like: where its layers are and which configuration entries belong to one layer."""

from __future__ import annotations

from sglp_deploy.models.base import Adapter, ConfigChange, LayerStack, ModelSource
from sglp_deploy.models.library import adapter_for, adapter_of_folder, layer_stack, layer_stacks, parameter_sizes
from sglp_deploy.models.loading import LoadedModel, fingerprint, load_model, precision, source_of
from sglp_deploy.models.quiet import quiet_libraries
from sglp_deploy.models.transformers.config import pruned_config
from sglp_deploy.models.transformers.families import FAMILIES, Family

__all__ = [
    "FAMILIES",
    "Adapter",
    "ConfigChange",
    "Family",
    "LayerStack",
    "LoadedModel",
    "ModelSource",
    "adapter_for",
    "adapter_of_folder",
    "fingerprint",
    "layer_stack",
    "layer_stacks",
    "load_model",
    "parameter_sizes",
    "precision",
    "pruned_config",
    "quiet_libraries",
    "source_of",
]
