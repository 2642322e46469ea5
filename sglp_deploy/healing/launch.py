"""What a launcher (torchrun, accelerate launch) tells a process of its team; read without torch."""

from __future__ import annotations

import os

from sglp_deploy.errors import ConfigError


def started_together() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) without a launcher.

    Raises:
        ConfigError: If what it says makes no sense.
    """
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE are no numbers; {error}; start the processes with torchrun, or unset both"
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK={rank} is outside WORLD_SIZE={size}; a process is missing; start them with torchrun")
    return rank, size


def own_device(device: str) -> str:
    """The device of this process, where ``device`` leaves open which of several GPUs is meant."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local and started_together()[1] > 1 else device
