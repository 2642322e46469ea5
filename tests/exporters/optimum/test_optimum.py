"""optimum: what is refused, and the whole way with an optimum that only pretends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import tiny
import zoo
from exports import Exported
from sglp_deploy import registry
from sglp_deploy.artifact import MANIFEST, ExportArtifact
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    MissingDependencyError,
    StorageError,
    UnsupportedModelError,
)
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.plan import PruningPlan
from sglp_deploy.protocols import Exporter, GeneratingRunner
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.optimum.exporter import OptimumExporter


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environments.variable("optimum"), raising=False)


def _pruned() -> tuple[Compressor, PruningPlan]:
    compressor = Compressor(tiny.loaded("llama"))
    return compressor, compressor.plan_by_hand([1, 4])


def test_the_exporter_is_what_the_protocol_asks_for() -> None:
    assert isinstance(registry.exporter("optimum"), Exporter)
    assert OptimumExporter().layer_type_formula("gemma2") is None


def test_options_other_weights_and_other_models_are_refused(tmp_path: Path) -> None:
    compressor, plan = _pruned()
    with pytest.raises(ConfigError, match=r"exporter 'optimum' does not know opset; it has no options"):
        compressor.export(plan, "optimum", tmp_path / "out", opset=17)
    half = tiny.loaded("llama")
    half.module.half()
    with pytest.raises(ConfigError, match=r"the weights are fp16; on a CPU optimum exports float32 only"):
        Compressor(half).export(plan, "optimum", tmp_path / "out")
    encoder = next(each for each in zoo.specimens() if each.group == "encoder").build()
    other = Compressor(LoadedModel(encoder, tiny.tokenizer(), source_of(encoder, "encoder")))
    with pytest.raises(UnsupportedModelError, match=r"is no decoder language model; this format is for decoders"):
        other.export(other.keep_all(), "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_its_environment_nothing_is_exported(tmp_path: Path) -> None:
    compressor, plan = _pruned()
    with pytest.raises(MissingDependencyError, match=r"'sglp-deploy env create optimum'"):
        compressor.export(plan, "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Packages of the names that the worker imports; the graph is the one our own exporter makes of the same layers.
_MODULES = {
    "optimum/__init__.py": "",
    "optimum/exporters/__init__.py": "",
    "optimum/exporters/onnx.py": """
import os, shutil
from pathlib import Path

def main_export(folder, out, **options):
    assert options == {"task": "text-generation-with-past", "device": "cpu", "dtype": "fp32",
                       "local_files_only": True, "do_validation": False}, options
    mode = os.environ.get("PRETEND", "")
    if mode == "full":
        raise OSError(28, "No space left on device")
    if mode == "unknown":
        raise ValueError("Trying to export a novel model, that is a custom or unsupported architecture")
    if mode == "two files":
        (Path(out) / "decoder_model.onnx").write_bytes(b"")
        return
    for file in Path(os.environ["GRAPH"]).glob("model.onnx*"):
        shutil.copy(file, out)
    shutil.copy(Path(folder) / "config.json", out)
""",
    "optimum/onnxruntime.py": """
import os
import torch

class ORTModelForCausalLM:
    @classmethod
    def from_pretrained(cls, folder, **options):
        return cls()

    def generate(self, input_ids, attention_mask):
        if os.environ.get("PRETEND") == "does not run":
            raise RuntimeError("Got invalid dimensions for input: past_key_values.3.key")
        tokens = [int(word) for word in os.environ["TOKENS"].split()]
        return torch.cat([input_ids, torch.tensor([tokens])], dim=1)
""",
    "optimum_onnx-0.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: optimum-onnx\nVersion: 0.0\n",
}


@pytest.fixture(scope="module")
def graph(exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The graph of the pruned model, and the tokens it continues the exporter's prompt with."""
    OnnxExporter._template = exported("llama").template
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "onnx", tmp_path_factory.mktemp("graph") / "onnx")
    prompt = [(7 + 31 * index) % tiny.VOCAB_SIZE for index in range(8)]
    tokens: list[int] = []
    with registry.exporter("onnx").open(artifact, threads=1) as runner:
        assert isinstance(runner, GeneratingRunner)
        logits = runner.prefill(np.array([prompt]))
        for _ in range(12):
            tokens.append(int(logits[0].argmax()))
            logits = runner.decode(np.array(tokens[-1:]))
    return artifact.path, tokens


@pytest.fixture
def pretending(graph: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    folder = tmp_path / "pretending"
    for name, text in _MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -W ignore "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    path, tokens = graph
    monkeypatch.setenv(environments.variable("optimum"), str(python))
    monkeypatch.setenv("GRAPH", str(path))
    monkeypatch.setenv("TOKENS", " ".join(map(str, tokens)))
    return tokens


def test_the_manifest_says_what_the_graph_takes_and_the_runner_certifies_it(
    pretending: list[int], tmp_path: Path
) -> None:
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "optimum", tmp_path / "out")
    assert sorted(artifact.files) == ["config.json", "model.onnx", "model.onnx.data", "sglp_plan.json"]
    assert sorted(file.name for file in artifact.path.iterdir()) == sorted([*artifact.files, MANIFEST])
    assert (artifact.precision, artifact.n_layers, artifact.plan_digest) == ("fp32", 4, plan.digest())
    assert "past_key_values.3.value" in {spec.name for spec in artifact.inputs}
    assert artifact.producer["optimum-onnx (environment)"] == "0.0"
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert report.runner == "ONNX Runtime over the graph of optimum-onnx 0.0, on cpu"
    tampered = artifact.path / "model.onnx.data"
    tampered.write_bytes(tampered.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match=r"differs from its digest in the manifest"):
        ExportArtifact.load(artifact.path)


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("full", StorageError, r"cannot write .*; no space is left"),
        ("unknown", UnsupportedModelError, r"optimum-onnx does not know LlamaForCausalLM; .*unsupported architecture"),
        ("two files", BackendError, r"optimum wrote decoder_model.onnx where one model.onnx was expected"),
        ("does not run", BackendError, r"ORTModelForCausalLM does not run what optimum exported; .*invalid dimensions"),
    ],
)
def test_what_optimum_does_wrong_is_one_error_and_leaves_nothing(
    pretending: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setenv("PRETEND", mode)
    compressor, plan = _pruned()
    with pytest.raises(kind, match=message):
        compressor.export(plan, "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_that_continues_otherwise_than_the_graph_is_refused(
    pretending: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [*pretending[:5], (pretending[5] + 1) % tiny.VOCAB_SIZE, *pretending[6:]]
    monkeypatch.setenv("TOKENS", " ".join(map(str, wrong)))
    compressor, plan = _pruned()
    with pytest.raises(BackendError, match=r"continues a prompt otherwise than its graph, from token 5 on"):
        compressor.export(plan, "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_the_runtime_has_not_is_refused_and_not_replaced(pretending: list[int], tmp_path: Path) -> None:
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "optimum", tmp_path / "out")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("needs an ONNX Runtime without CUDA")
    with pytest.raises(BackendError, match=r"this ONNX Runtime has no CUDAExecutionProvider"):
        OptimumExporter().open(artifact, device="cuda").__enter__()


def test_the_benchmarks_way_in_loads_no_torch() -> None:
    root = Path(__file__).parents[3]
    code = "import sys, sglp_exporters.optimum; sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join([str(root), str(root / "exporters")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0
