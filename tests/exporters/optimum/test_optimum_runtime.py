"""The graph that optimum-onnx itself makes of pruned models computes what they do, and its own class runs it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import tiny
import zoo
from gguf_files import forge
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import BackendError, UnsupportedModelError
from sglp_deploy.isolation import environments
from sglp_deploy.isolation.workers import Worker
from sglp_deploy.materialize import write_checkpoint_files
from sglp_deploy.models import LoadedModel, source_of
from sglp_exporters.optimum import exporter as exporting

pytestmark = [
    pytest.mark.optimum,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(environments.variable("optimum")),
        reason="needs SGLP_PYTHON_OPTIMUM, the interpreter of the environment 'optimum' (make test-optimum)",
    ),
]


def _compressor(family: str, **changes: Any) -> Compressor:
    module = tiny.model(family, **changes)
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, f"tiny-{family}")))


# optimum's class works out the head size of most families from their width, so the tiny ones must agree with that.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma3", {}),
    ],
)
def test_a_pruned_decoder_is_certified(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Qwen2 and Gemma-3 beyond their windows and out of step; Llama with a rotary base that is not the default."""
    compressor = _compressor(family, **changes)
    plan = compressor.plan_by_hand([i for i in range(compressor.n_layers) if i not in tiny.KEEP[family]])
    artifact = compressor.export(plan, "optimum", tmp_path / "out")
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert report.runner.startswith("ONNX Runtime over the graph of optimum-onnx 0.")
    assert {"config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"} <= set(artifact.files)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Compressor, ExportArtifact]:
    compressor = _compressor("llama", head_dim=16)
    plan = compressor.plan_by_hand([1, 4])
    return compressor, compressor.export(plan, "optimum", tmp_path_factory.mktemp("llama") / "out")


def _damaged(artifact: ExportArtifact, folder: Path, damage: Callable[[onnx.ModelProto], None]) -> ExportArtifact:
    """A copy whose graph went through ``damage``, with a manifest that agrees with it."""
    shutil.copytree(artifact.path, folder)
    model = onnx.load(folder / "model.onnx")
    damage(model)
    changed = folder.with_name("changed.onnx")  # beside it, or the folder would hold a file nobody listed
    onnx.save(model, changed)
    return forge(ExportArtifact.load(folder, check_files=False), changed, "model.onnx")


def _norm_changed(model: onnx.ModelProto) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == "model.layers.2.input_layernorm.weight")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _caches_exchanged(model: onnx.ModelProto) -> None:
    names = {"present.1.key": "present.2.key", "present.2.key": "present.1.key"}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]


def _rounded(model: onnx.ModelProto) -> None:
    """Weights kept as float16 and cast back where they are used: the interface stays float32."""
    for tensor in list(model.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            half = onnx.numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}.half")
            cast = onnx.helper.make_node("Cast", [half.name], [tensor.name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(half)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_norm_changed, "model.layers.2.input_layernorm.weight differs in 1 of 64 values, by 0.5 at most"),
        (_caches_exchanged, "cache of the wrong layer: present.1.key holds what the model keeps as present.2.key"),
        (_rounded, "of the weights are stored as float16"),
    ],
)
def test_a_fault_in_its_graph_is_named(
    llama: tuple[Compressor, ExportArtifact],
    damage: Callable[[onnx.ModelProto], None],
    said: str,
    tmp_path: Path,
) -> None:
    compressor, artifact = llama
    report = compressor.verify(_damaged(artifact, tmp_path / "damaged", damage), threads=1)
    assert not report.passed
    assert said in " ".join(report.reasons)


def test_a_rotary_base_reaches_the_older_library(tmp_path: Path) -> None:
    """It would take a base it does not find for 10000 and say nothing; so it is written where it looks, too."""
    compressor = _compressor("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    folder.mkdir()
    write_checkpoint_files(compressor.materialize(compressor.keep_all()), folder)
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 500.0
    with Worker(environments.interpreter("optimum"), exporting._WORKER, name="optimum") as worker:
        worker.ask("export", folder=str(folder), out=str(out))
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 500.0


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    compressor = _compressor("llama")
    folder, out = tmp_path / "checkpoint", tmp_path / "out"
    folder.mkdir()
    write_checkpoint_files(compressor.materialize(compressor.keep_all()), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        Worker(environments.interpreter("optimum"), exporting._WORKER, name="optimum") as worker,
        pytest.raises(BackendError, match=r"1 tensors are missing.*, first model.layers.3.mlp.up_proj.weight"),
    ):
        worker.ask("export", folder=str(folder), out=str(out))


def test_a_head_size_that_optimums_class_does_not_believe_is_refused(tmp_path: Path) -> None:
    compressor = _compressor("llama")  # heads of 32 in a width of 64 for four
    with pytest.raises(
        BackendError, match=r"ORTModelForCausalLM does not run what optimum exported; .*past_key_values"
    ):
        compressor.export(compressor.keep_all(), "optimum", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_it_does_not_know_is_refused(tmp_path: Path) -> None:
    specimen = next(each for each in zoo.specimens() if each.name == "jamba")
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, "jamba")))
    with pytest.raises(UnsupportedModelError, match=r"optimum-onnx does not know JambaForCausalLM"):
        compressor.export(compressor.keep_all(), "optimum", tmp_path / "out")
