"""Weights that a plan changes, as one file beside it: what a merge, a repair or healing made.

``overlay.safetensors`` holds tensors under their names in the *unpruned* model, of the same shape and type.  The plan
names its digest.  :func:`sglp_deploy.materialize.materialize` puts the tensors into the kept layers.  A certificate's
reference loads them by the same names into the unpruned model.  So a tensor that went to another layer shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sglp_deploy import _io
from sglp_deploy.errors import ArtifactError, PlanError

if TYPE_CHECKING:
    import torch
    from torch import nn

OVERLAY_FILE: Final = "overlay.safetensors"
HEAL: Final = "heal"  # what the record of healing has in place of a repair's name
FORMAT: Final = "overlay/1"  # in the file's metadata; history: 1 = first


class Overlay:
    """Tensors by their names in the unpruned model, and who made them.

    Args:
        tensors: Same shapes and types as there; at least one.
        made_by: One record for each step that changed weights, in order: its name, and what it was judged by
            (``{"repair": "refit", "loss_before": 4.1, "loss_after": 3.6}``).

    Raises:
        PlanError: If there is no tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], made_by: Sequence[Mapping[str, Any]] = ()) -> None:
        if not tensors:
            raise PlanError("the overlay holds no tensor; a plan without changed weights has none; leave it out")
        # Copies: somebody may go on training the tensors that were given, and the digest is of these values.
        self._tensors: Mapping[str, torch.Tensor] | None = {name: _copied(tensors[name]) for name in sorted(tensors)}
        self._path: Path | None = None
        self._made_by = tuple(dict(record) for record in made_by)
        self._digest = _digest_of(self._tensors)

    @classmethod
    def open(cls, path: str | Path, named: Mapping[str, Any]) -> Overlay:
        """The overlay in ``path``; nothing is read before the tensors are asked for.

        Args:
            path: The file.
            named: What the plan says of it (:attr:`sglp_deploy.plan.PruningPlan.overlay`).

        Raises:
            ArtifactError: If there is no such file.
        """
        file = Path(path)
        if not file.is_file():
            raise ArtifactError(f"{file} does not exist; the plan's weights were expected there; check the path")
        made = cls.__new__(cls)
        made._tensors, made._path = None, file.absolute()
        made._made_by = tuple(dict(record) for record in named["made_by"])
        made._digest = str(named["digest"])
        return made

    @property
    def path(self) -> Path | None:
        """Where it lies; None for one that was never on disk."""
        return self._path

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values; for one on disk, what the plan says it is."""
        return self._digest

    @property
    def made_by(self) -> tuple[Mapping[str, Any], ...]:
        """One record for each step that changed weights."""
        return self._made_by

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name, in order of name; read and compared with the digest on first use.

        Raises:
            ArtifactError: If the file is damaged or belongs to another plan.
        """
        if self._tensors is None:
            assert self._path is not None
            self._tensors = self._read(self._path)
        return self._tensors

    def named(self) -> dict[str, Any]:
        """What the plan records of it: ``digest``, ``n_tensors``, ``bytes`` and ``made_by``."""
        return {
            "digest": self.digest,
            "n_tensors": len(self.tensors),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values()),
            "made_by": [dict(record) for record in self.made_by],
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Overlay:
        """This overlay with some tensors added or replaced by a further step."""
        return Overlay({**self.tensors, **tensors}, (*self.made_by, record))

    def save(self, path: str | Path) -> Path:
        """Write the file atomically; returns its path, which is from now on where the overlay lies.

        Raises:
            PlanError: If a tensor was changed since the overlay was made.
            StorageError: If it cannot be written; an older file stays as it was.
        """
        from safetensors.torch import save_file

        file = Path(path)
        whole = dict(self.tensors)
        if _digest_of(whole) != self._digest:
            raise PlanError(
                "a tensor of the overlay was changed after the overlay was made; the plan names other weights; make "
                "the overlay again from the changed tensors"
            )
        with _io.staged_file(file) as staged:
            save_file(whole, staged, metadata={"schema": FORMAT})
        self._path = file.absolute()
        return file

    def check(self, module: nn.Module) -> None:
        """Refuse tensors that no checkpoint of the unpruned ``module`` holds, or holds in another shape or type.

        Raises:
            PlanError: Naming the first such tensor.
        """
        there = stored_tensors(module)
        for name, tensor in self.tensors.items():
            own = there.get(name)
            if own is None:
                raise PlanError(
                    f"the overlay changes {name}, which is no stored tensor of the model; it was made for another "
                    "model; make it again for this one"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise PlanError(
                    f"the overlay's {name} holds NaN or infinity; the model would give nonsense; find out what made it"
                )
            if own.shape != tensor.shape or own.dtype != tensor.dtype:
                raise PlanError(
                    f"the overlay's {name} is {_kind(tensor)}, the model's is {_kind(own)}; it was made for another "
                    "model or element type; load the model with the type it was made in, or make the overlay again"
                )

    def _read(self, path: Path) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                schema = (opened.metadata() or {}).get("schema")
                # Copies: what is read is mapped from the file, and would change with it after it was checked.
                tensors = {name: _copied(opened.get_tensor(name)) for name in sorted(opened.keys())}
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} cannot be read as an overlay; {error}; restore it, or make the plan again"
            ) from error
        if schema != FORMAT:
            raise ArtifactError(f"{path} has schema {schema!r}; this version reads {FORMAT!r}; make the plan again")
        found = _digest_of(tensors)
        if found != self._digest:
            raise ArtifactError(
                f"{path} is not the overlay the plan names ({found[:12]}, not {self._digest[:12]}); it was altered or "
                "belongs to another plan; restore it, or make the plan again"
            )
        return tensors


def repairs_of(named: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The records of repairs among the steps that made an overlay, in order.

    Args:
        named: What the plan says of it (:attr:`sglp_deploy.plan.PruningPlan.overlay`), or None.
    """
    return [record for record in (named or {}).get("made_by", ()) if "repair" in record]


def stored_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and the buffers that checkpoints hold, by every name they have.

    Buffers that a model computes for itself are left out: a change of one would be lost with the next load.
    """
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, buffer in owner.named_buffers(recurse=False):
            if leaf not in owner._non_persistent_buffers_set:
                found[f"{path}.{leaf}" if path else leaf] = buffer
    return found


def as_tensor(value: Any) -> torch.Tensor:
    """A tensor of what a planner made, numpy arrays included.

    Raises:
        PlanError: If it is no array of numbers.
    """
    import torch

    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"changed weights are tensors or arrays; {error}; the planner is at fault") from error


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """The values in memory of their own, on the CPU, in order."""
    return tensor.detach().cpu().contiguous().clone()


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
