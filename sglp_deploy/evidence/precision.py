"""What matrices are multiplied in while a model is measured, repaired or healed; its weights keep their type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def precision_of(asked: str, module: nn.Module) -> torch.dtype:
    """The element type for ``asked`` ("auto", "fp32", "bf16") where ``module`` lies.

    "auto" is bfloat16 where the processor has instructions for its products.  Elsewhere it would only be slower.
    """
    if asked == "auto":
        device = next(module.parameters()).device
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if asked == "bf16" else torch.float32


def computing(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """A context in which matrices are multiplied in ``precision``."""
    if precision is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
