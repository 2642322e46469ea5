"""Ways to get the weights of a plan wrong, over the families of :mod:`mutations`, and what the product says to each.

Planted in the process that puts an overlay into the pruned model (``PROCESS``), or in the files of a plan and its
overlay while an artifact that was made right is verified (``FILES``).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mutations
from mutations import SUBJECTS, Bench, Subject
from overlays import overlay_of
from sglp_deploy import CalibrationSet, Compressor, materialize
from sglp_deploy.artifact import PLAN_FILE, ExportArtifact
from sglp_deploy.errors import ArtifactError, SGLPError
from sglp_deploy.overlay import OVERLAY_FILE, Overlay
from sglp_deploy.plan import PruningPlan

OTHER_FILE = "other.safetensors"
REFUSED = "overlay"
MISSING = "no overlay"
# What a user sees of the two checks that are the overlay's own.
REFUSALS = {
    REFUSED: r"is not the overlay the plan names|cannot be read as an overlay",
    MISSING: r"the weights that the plan of .* changes .* are not at hand; .*; name the file with --overlay",
}


def matrices_of(subject: Subject) -> tuple[str, str]:
    """In the unpruned model, the matrix of two kept layers of one kind."""
    _, _, rest = subject.matrix.removeprefix(f"{subject.layers}.").partition(".")
    one, other = (f"{subject.layers}.{subject.keep[twin]}.{rest}" for twin in subject.twins)
    return one, other


def norm_of(subject: Subject) -> str:
    """In the unpruned model, the norm of a kept layer.

    It is what is scaled: Gemma-3 norms what its MLP returns, so a matrix there that is scaled computes the same.
    """
    new, _, rest = subject.norm.removeprefix(f"{subject.layers}.").partition(".")
    return f"{subject.layers}.{subject.keep[int(new)]}.{rest}"


def names_of(subject: Subject) -> tuple[str, ...]:
    """What each family's overlay changes."""
    return *matrices_of(subject), norm_of(subject)


# ------------------------------------------------------------------------------------------------------ in the process


def _instead(patch: pytest.MonkeyPatch, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The pruned model gets other tensors than the plan's; the reference gets the plan's."""
    real = materialize.put_overlay

    def altered(pruned: Any, overlay: Overlay, *rest: Any) -> None:
        tensors = dict(overlay.tensors)
        change(tensors)
        real(pruned, Overlay(tensors), *rest)

    patch.setattr(materialize, "put_overlay", altered)


def _exchange(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    one, other = matrices_of(subject)

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    _instead(patch, exchange)


def _scale(patch: pytest.MonkeyPatch, subject: Subject) -> None:
    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[norm_of(subject)] = tensors[norm_of(subject)] * 1.01

    _instead(patch, scale)


def _forget(patch: pytest.MonkeyPatch, _subject: Subject) -> None:
    patch.setattr(materialize, "put_overlay", lambda *_given: None)


PROCESS: Mapping[str, Callable[[pytest.MonkeyPatch, Subject], None]] = {
    "exchange a tensor between two layers": _exchange,
    "scale a norm by 1.01": _scale,
    "leave the overlay out": _forget,
}

# -------------------------------------------------------------------------------------------------------- in the files


@dataclass(frozen=True)
class Files:
    """Copies of what verification reads.

    Attributes:
        artifact: Folder of the artifact, with its plan.
        overlay: File of the weights, where the run's would lie.
        other: Overlay of another plan for the same model.
    """

    artifact: Path
    overlay: Path
    other: Path


def _flip(files: Files) -> None:
    data = bytearray(files.overlay.read_bytes())
    data[-5] ^= 1
    files.overlay.write_bytes(data)


def _truncate(files: Files) -> None:
    files.overlay.write_bytes(files.overlay.read_bytes()[:-5])


def _replace(files: Files) -> None:
    shutil.copy(files.other, files.overlay)


def _edit_digest(files: Files) -> None:
    """The plan names the digest of the other overlay, which then lies where the right one lay."""
    file = files.artifact / PLAN_FILE
    right = json.loads(file.read_text())["overlay"]["digest"]
    file.write_text(file.read_text().replace(right, Overlay(load_file(files.other)).digest))
    _replace(files)


def _edit_digests(files: Files) -> None:
    """And the manifest says that the artifact was made by such a plan."""
    _edit_digest(files)
    file = files.artifact / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["plan_digest"] = PruningPlan.load(files.artifact / PLAN_FILE).digest()
    file.write_text(json.dumps(manifest))


FILES: Mapping[str, Callable[[Files], None]] = {
    "flip one bit of the file": _flip,
    "truncate the file": _truncate,
    "put the file of another plan there": _replace,
    "remove the file": lambda files: files.overlay.unlink(),
    "name another overlay's digest in the plan": _edit_digest,
    "name another overlay's digest in plan and manifest": _edit_digests,
}

# --------------------------------------------------------------------------------------------------------- the answers

CAUGHT_IN_PROCESS: Mapping[str, str] = dict.fromkeys(PROCESS, "numbers")
# As the files were left, and with the manifest's digests made to fit them.
CAUGHT_IN_FILES: Mapping[str, tuple[str, str]] = {
    "flip one bit of the file": (REFUSED, REFUSED),
    "truncate the file": (REFUSED, REFUSED),
    "put the file of another plan there": (REFUSED, REFUSED),
    "remove the file": (MISSING, MISSING),
    "name another overlay's digest in the plan": ("digest", "plan digest"),
    "name another overlay's digest in plan and manifest": ("digest", "numbers"),
}


def table() -> str:
    """The table of ``docs/verification.md``, as Markdown; a check answers alike in every family and format."""
    rows = [[name, "process", CAUGHT_IN_PROCESS[name]] for name in CAUGHT_IN_PROCESS]
    for name, (left, fixed) in CAUGHT_IN_FILES.items():
        rows.append([name, "files", left if left == fixed else f"{left}; {fixed}"])
    lines = [["mutation", "planted in", ", ".join(subject.name for subject in SUBJECTS)], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class OverlayBench(Bench):
    """The bench of :mod:`mutations`, whose plans change two matrices and a norm."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._root = folder

    def plan(self, subject: Subject) -> PruningPlan:
        """A plan with an overlay that lies beside its file."""
        file = self._root / subject.name / "plan.json"
        if not file.is_file():
            module = self.loaded(subject).module
            plan = super().plan(subject).with_overlay(overlay_of(module, names_of(subject)))
            plan.save(file)
            plan.save_overlay(file.parent)
            overlay_of(module, matrices_of(subject)[::-1]).save(file.with_name(OTHER_FILE))
        return PruningPlan.load(file)

    def copies(self, subject: Subject, to: str, folder: Path) -> Files:
        """What :meth:`verify` reads, to be changed: laid out as a run's folder is."""
        artifact = Path(shutil.copytree(self.artifact(subject, to), folder / "run" / "artifacts" / to))
        right = self._root / subject.name
        return Files(
            artifact,
            Path(shutil.copy(right / OVERLAY_FILE, folder / "run" / OVERLAY_FILE)),
            Path(shutil.copy(right / OTHER_FILE, folder / OTHER_FILE)),
        )

    def verify_from(self, subject: Subject, files: Files) -> str:
        """Certify the copied artifact with the copied overlay, wherever its manifest says the overlay lay."""
        manifest = json.loads((files.artifact / "manifest.json").read_text())
        manifest["model"].pop("overlay_file", None)
        (files.artifact / "manifest.json").write_text(json.dumps(manifest))
        try:
            artifact = ExportArtifact.load(files.artifact)
            text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
            return mutations.verdict(Compressor(self.loaded(subject)).verify(artifact, text=text))
        except SGLPError as error:
            return classify(error)

    def judge_process(self, name: str, subject: Subject, to: str, out: Path, patch: pytest.MonkeyPatch) -> str:
        """Export and verify with the mutation in force all the while, as a bug of ours would be."""
        PROCESS[name](patch, subject)
        self.export(subject, to, out)
        return self.verify(subject, out)


def classify(error: SGLPError) -> str:
    """Name of the check an error comes from."""
    for name, message in REFUSALS.items():
        if type(error) is ArtifactError and re.search(message, str(error)):
            return name
    return mutations.classify(error)
