"""Where training stands, in one file, so that a killed run goes on and ends where an unbroken one would have ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from sglp_deploy import _io

FORMAT: Final = "healing/1"  # in the file's metadata; history: 1 = first

# Names of states, of what lies beside them, and of what a killed process left half written.
_OURS: Final = re.compile(r"\.?[0-9a-f]{32}\.(safetensors|taught|rows)")

# Between two writes: at least this long, and so long that writing takes a twentieth of the time at most.
INTERVAL_S = 60.0
_TIMES_THE_WRITE = 20.0


@dataclass
class Standing:
    """Numbers of a training that is under way.

    Attributes:
        step: Steps done.
        elapsed_s: Training time so far, over all resumes.
        evaluations: Held-out loss by progress: (progress, nats per token).
        best: The lowest held-out loss; infinity before the first.
        best_step: The step it was taken after.
    """

    step: int = 0
    elapsed_s: float = 0.0
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    best: float = float("inf")
    best_step: int = -1


class Keeper:
    """Writes and finds the state of one training.

    Args:
        folder: Made when needed.  None keeps nothing.
        key: Digest of everything that decides the result; a state of another key is removed.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        self._key = key
        self._file = None if folder is None else folder / f"{key[:32]}.safetensors"
        self._due = time.monotonic() + INTERVAL_S

    def read(self) -> tuple[Standing, dict[str, torch.Tensor]] | None:
        """What an earlier process left, or None; what belongs to another training goes."""
        if self._folder is None or self._file is None or not self._folder.is_dir():
            return None
        for other in self._folder.iterdir():
            if _OURS.match(other.name) and not other.name.startswith(self._file.stem):
                other.unlink()
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file, framework="pt") as opened:
                facts: Mapping[str, str] = opened.metadata() or {}
                if facts.get("schema") != FORMAT or facts.get("key") != self._key:
                    return None
                standing = Standing(**json.loads(facts["standing"]))
                tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118  # no dict: it cannot be iterated over
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # none, or damaged: training begins anew and ends at the same weights
        standing.evaluations = [(float(at), float(loss)) for at, loss in standing.evaluations]
        return standing, tensors

    def beside(self, name: str) -> Path | None:
        """A file for what only this training can use; None where nothing is kept."""
        return None if self._file is None else self._file.with_suffix(f".{name}")

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self._file is not None and time.monotonic() >= self._due

    def write(self, standing: Standing, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the file, atomically.

        Raises:
            StorageError: If it cannot be written; the older one stays.
        """
        if self._file is None:
            return
        from safetensors.torch import save_file

        started = time.monotonic()
        facts = {"schema": FORMAT, "key": self._key, "standing": json.dumps(asdict(standing))}
        with _io.staged_file(self._file) as staged:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, staged, facts)
        now = time.monotonic()
        self._due = now + max(INTERVAL_S, _TIMES_THE_WRITE * (now - started))

    def clear(self) -> None:
        """Training is done, or nobody wants it any more."""
        if self._folder is None or self._file is None:
            return
        self._file.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()


def key_of(facts: Any) -> str:
    """Digest of what decides a training's result."""
    return _io.sha256_json([FORMAT, facts])
