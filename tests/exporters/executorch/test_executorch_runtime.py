"""ExecuTorch itself: a lowered program computes what the pruned model does, by XNNPACK, or the fault is seen."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny
import zoo
from sglp_deploy import _io
from sglp_deploy.artifact import MANIFEST, ExportArtifact, TensorSpec
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ArtifactError, BackendError
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel, source_of
from sglp_exporters.executorch.exporter import ExecuTorchExporter
from sglp_exporters.executorch.runner import MODEL_FILE

pytestmark = [
    pytest.mark.executorch,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(environments.variable("executorch")),
        reason="needs SGLP_PYTHON_EXECUTORCH, the interpreter of the environment 'executorch' (make test-executorch)",
    ),
]


def _specimen(name: str) -> Compressor:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))


@dataclass
class Made:
    """A compressor and the certified-to-be artifact of its pruned model."""

    compressor: Compressor
    pruned: Any
    artifact: ExportArtifact


def _made(compressor: Compressor, drop: list[int], folder: Path) -> Made:
    plan = compressor.plan_by_hand(drop)
    return Made(
        compressor, compressor.materialize(plan).module, compressor.export(plan, "executorch", folder / "artifact")
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _made(Compressor(tiny.loaded("llama")), [1, 3, 4], tmp_path_factory.mktemp("executorch"))


def test_a_pruned_decoder_is_certified(llama: Made) -> None:
    report = llama.compressor.verify(llama.artifact, threads=1)
    assert report.passed, report.reasons
    assert report.runner.startswith("ExecuTorch 1.")
    assert report.runner.endswith("XNNPACK, 1 thread, rows one after another")


def test_the_manifest_says_what_xnnpack_runs(llama: Made) -> None:
    details = llama.artifact.details
    xnnpack = details["xnnpack"]
    assert xnnpack["backends"] == ["XnnpackBackend"]
    assert xnnpack["delegated"]["linear"] >= 7 * 3 + 1  # the projections of three layers, and the head
    assert xnnpack["delegated"]["bmm"] == 2 * 3
    assert not {"linear", "addmm", "mm", "bmm"} & set(xnnpack["portable"])
    assert xnnpack["portable"]["index_put_"] == 2 * 3  # keys and values, written in place
    # XNNPACK has a copy of the matrices, the tied embedding's too, and of what the trace adds: the mean, the rotation.
    weights = list(llama.pruned.parameters())
    matrices = sum(weight.nbytes for weight in weights if weight.ndim == 2)
    vectors = sum(weight.nbytes for weight in weights if weight.ndim == 1)
    assert xnnpack["delegated_weight_bytes"] == matrices + 4 * (64 + 32 * 32)
    # Outside lie the embedding to look rows up in, the norms' weights, which are handed in, and the frequencies.
    outside = llama.pruned.get_input_embeddings().weight.nbytes + vectors
    assert 0 <= xnnpack["portable_weight_bytes"] - outside < 256
    assert llama.artifact.weight_bytes == xnnpack["delegated_weight_bytes"] + xnnpack["portable_weight_bytes"]
    assert llama.artifact.outputs == (TensorSpec("logits", "float32", (1, "kept", tiny.VOCAB_SIZE)),)
    assert details["program"]["cache"] == ["float32 [1, 2, 256, 32]"] * 6
    assert sorted(llama.artifact.files) == [MODEL_FILE, "sglp_plan.json"]
    assert sorted(file.name for file in llama.artifact.path.iterdir()) == [
        "manifest.json",
        MODEL_FILE,
        "sglp_plan.json",
    ]


def test_a_window_holds_in_a_broken_pattern(tmp_path: Path) -> None:
    # Two sliding layers and a full one repeat; what stays is sliding, full, sliding.  With GELU by tanh.
    made = _made(Compressor(tiny.loaded("gemma3")), [1, 3, 4, 5], tmp_path)
    report = made.compressor.verify(made.artifact, threads=1)
    assert report.passed, report.reasons
    assert any("beyond window 8" in case["name"] for case in report.cases)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_pruned_encoder_is_certified(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a worker has a folder of its own, where a relative path means nothing
    made = _made(_specimen(name), [1, 2, 4], Path("here"))
    report = made.compressor.verify(made.artifact, threads=1)
    assert report.passed, report.reasons
    assert made.artifact.details["interface"] == "forward"


def test_a_corrupted_weight_fails_its_certificate(llama: Made, tmp_path: Path) -> None:
    weight = llama.pruned.model.layers[1].post_attention_layernorm.weight.detach().numpy()
    content = (llama.artifact.path / MODEL_FILE).read_bytes()
    assert content.count(weight.tobytes()) == 1
    forged = _forged(llama.artifact, tmp_path, content.replace(weight.tobytes(), (weight * 1.01).tobytes()))
    report = llama.compressor.verify(forged, threads=1)
    assert not report.passed


def test_a_program_with_another_number_of_caching_layers_is_refused_by_name(llama: Made, tmp_path: Path) -> None:
    other = _made(llama.compressor, [1, 2, 3, 4], tmp_path)
    forged = _forged(llama.artifact, tmp_path, (other.artifact.path / MODEL_FILE).read_bytes())
    with pytest.raises(ArtifactError, match=r"cache tensor 4 is nothing, the manifest says float32 \[1, 2, 256, 32\]"):
        llama.compressor.verify(forged, threads=1)


def test_a_model_xnnpack_takes_nothing_of_is_refused_as_a_silent_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNNPACK knows no float64, and ExecuTorch would run all of it in portable kernels."""
    monkeypatch.setattr(ExecuTorchExporter, "check_precision", lambda self, precision: None)
    compressor = _specimen("vit")
    plan = compressor.plan_by_hand([1, 2, 3, 4])
    pruned = compressor.materialize(plan)
    pruned.module.double()
    with pytest.raises(BackendError, match="silent fallback: XNNPACK took 0 of this model's"):
        ExecuTorchExporter().export(pruned, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_program_is_one_error_with_the_worker_s_last_words(llama: Made, tmp_path: Path) -> None:
    forged = _forged(llama.artifact, tmp_path, b"no program")
    with pytest.raises(BackendError, match="the ExecuTorch worker failed on 'start'"):
        ExecuTorchExporter().open(forged).__enter__()


def test_the_threads_asked_for_are_the_threads_used(llama: Made) -> None:
    with ExecuTorchExporter().open(llama.artifact, threads=2) as runner:
        assert "XNNPACK, 2 threads" in runner.description


def _forged(artifact: ExportArtifact, folder: Path, program: bytes) -> ExportArtifact:
    """The artifact with another program, and a manifest that agrees with it."""
    forged = folder / "forged"
    forged.mkdir()
    for name in (MANIFEST, "sglp_plan.json"):
        (forged / name).write_bytes((artifact.path / name).read_bytes())
    (forged / MODEL_FILE).write_bytes(program)
    manifest = json.loads((forged / MANIFEST).read_text())
    manifest["files"][MODEL_FILE] = {"sha256": _io.sha256_file(forged / MODEL_FILE), "bytes": len(program)}
    (forged / MANIFEST).write_text(json.dumps(manifest))
    return ExportArtifact.load(forged)
