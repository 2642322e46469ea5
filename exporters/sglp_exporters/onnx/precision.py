"""A model in another element type, for exporters whose graphs take their types from the model that is traced."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglp_deploy.artifact import ELEMENT_TYPES
from sglp_deploy.errors import BackendError

if TYPE_CHECKING:
    import torch

    from sglp_deploy.materialize import CompressedModel


def in_precision(model: CompressedModel, precision: str | None) -> CompressedModel:
    """``model`` with its weights in another element type, in tensors of its own; itself when it has that type.

    As transformers' ``from_pretrained(dtype=...)`` does it: parameters and stored buffers change, except those the
    family keeps in float32; buffers that are computed (the frequencies of rotary positions) do not.

    Raises:
        BackendError: If a weight is too large for the type.
    """
    import torch

    from sglp_deploy.models import precision as precision_of

    before = precision_of(model.module)
    if precision is None or precision == before:
        return model
    dtype = getattr(torch, ELEMENT_TYPES[precision])
    module = copy.deepcopy(model.module)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else set()
    kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) if dtype is torch.float16 else set()

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or kept & set(name.split(".")):
            return tensor
        made = tensor.to(dtype)
        if not bool(torch.isfinite(made).all()) and bool(torch.isfinite(tensor).all()):
            raise BackendError(
                f"{name} holds {float(tensor.abs().max()):.3g}, beyond {precision}; the artifact would give NaN; "
                "export it with precision='fp32'"
            )
        return made

    for name, parameter in module.named_parameters():
        parameter.data = cast(name, parameter.data)
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = cast(f"{prefix}.{name}", buffer)
    config: Any = getattr(module, "config", None)
    if config is not None:
        config.dtype = dtype
    return replace(model, module=module)
