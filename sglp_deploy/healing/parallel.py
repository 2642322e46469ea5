"""Several processes that train one model on different rows, as torchrun (or accelerate launch) starts them.

Each holds the whole model.  Gradients are added up after each step's last pass.  So the steps are those of one process
with the same rows, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from sglp_deploy.healing.launch import started_together

_PATIENCE = timedelta(minutes=30)  # of a process that waits: another may be writing a large state
_BUCKET = 1 << 25  # elements that are added up at once


@dataclass(frozen=True)
class Team:
    """The processes that train together.

    Attributes:
        rank: Of this process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process decides, writes and speaks."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size == 1:
            return
        waiting: list[torch.Tensor] = []
        for tensor in tensors:
            if waiting and sum(each.numel() for each in waiting) + tensor.numel() > _BUCKET:
                _add_up(waiting)
                waiting = []
            waiting.append(tensor)
        if waiting:
            _add_up(waiting)

    def agree(self, values: Sequence[float]) -> list[float]:
        """What the first process says."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(list(values), dtype=torch.float64, device=_place())
        distributed.broadcast(told, 0)
        return [float(value) for value in told.tolist()]

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def _add_up(tensors: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    distributed.all_reduce(flat)
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def _place() -> torch.device:
    """Where a message between processes has to lie."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """The processes started together; they are connected while the block runs.

    Args:
        device: Where this process has its model.
    """
    rank, size = started_together()
    if size == 1:
        yield Team()
        return
    mine = not distributed.is_initialized()
    if mine:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Team(rank, size)
    finally:
        if mine:
            distributed.destroy_process_group()
