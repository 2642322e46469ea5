"""No fact of a manifest is believed that the artifact itself contradicts, and no file goes unchecked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from sglp_deploy import _io
from sglp_deploy.artifact import CERTIFICATE, MANIFEST, ExportArtifact
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ArtifactError

Made = tuple[Compressor, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint artifact of a pruned model."""
    compressor = Compressor(tiny.loaded("llama", num_hidden_layers=3))
    folder = tmp_path_factory.mktemp("manifest") / "artifact"
    compressor.export(compressor.plan_by_hand([1]), "vllm", folder)
    return compressor, folder


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """A copy of the artifact to tamper with."""
    return Path(shutil.copytree(made[1], tmp_path / "artifact"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    change(value)
    (folder / MANIFEST).write_text(json.dumps(value))


def test_a_manifest_that_lists_nothing_does_not_pass_for_one_of_nothing(folder: Path) -> None:
    _edit(folder, lambda value: value.update(files={}))
    with pytest.raises(ArtifactError, match=r"is not in the manifest; a runtime would read it unchecked; move it away"):
        ExportArtifact.load(folder)


@pytest.mark.parametrize("name", ["more.safetensors", "vocab.txt", "part/config.json"])
def test_a_file_nobody_listed_is_refused(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ArtifactError, match=rf"{name} is not in the manifest"):
        ExportArtifact.load(folder)


def test_a_certificate_and_hidden_files_may_lie_there(made: Made, folder: Path) -> None:
    artifact = ExportArtifact.load(folder)
    made[0].verify(artifact, threads=1).save(folder / CERTIFICATE)
    (folder / ".DS_Store").write_text("")
    assert ExportArtifact.load(folder) == artifact
    assert _io.foreign_files(folder) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_layers": 3}, "the manifest says 3 layers, the plan keeps 2"),
        ({"weight_bytes": 5}, "the manifest says 5 bytes of weights, the files hold"),
        (
            {"model": {"id": "m", "fingerprint": "f" * 64}},
            "the manifest names another model than the one compared with",
        ),
        ({"precision": "bf16"}, "wrong dtype: 100% of the weights are stored as float32"),
    ],
)
def test_a_fact_that_is_not_so_fails_the_certificate(
    made: Made, folder: Path, change: dict[str, Any], reason: str
) -> None:
    _edit(folder, lambda value: value.update(change))
    report = made[0].verify(ExportArtifact.load(folder), threads=1)
    assert not report.passed
    assert any(each.startswith(reason) for each in report.reasons), report.reasons
