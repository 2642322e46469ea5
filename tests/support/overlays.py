"""Overlays made by hand: tensors of a tiny model, changed so much that whoever leaves them out computes else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sglp_deploy.overlay import Overlay


def changed(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """``tensor`` scaled and perturbed, in memory of its own; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator) * 0.05
    return (tensor.detach().float().cpu() * 1.3 + noise).to(tensor.dtype)


def overlay_of(module: nn.Module, names: Iterable[str] | None = None) -> Overlay:
    """An overlay that changes these tensors of ``module``, or every parameter once."""
    there = dict(module.named_parameters(remove_duplicate=False))
    wanted = [name for name, _ in module.named_parameters()] if names is None else list(names)
    return Overlay({name: changed(there[name], seed) for seed, name in enumerate(wanted)}, [{"by": "hand"}])
