"""int8 for TensorRT: what ModelOpt is given and what is made of its answer, and the whole of it where ModelOpt is."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny
from exports import Exported
from sglp_deploy import Compressor
from sglp_deploy.errors import BackendError, ConfigError, MissingDependencyError
from sglp_deploy.isolation import environments, workers
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.parity.certificate import ParityReport
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.onnx.passes import required_inputs
from sglp_exporters.tensorrt import int8 as tensorrt_int8
from sglp_exporters.tensorrt import kit as tensorrt_kit
from zoo_vision import SPECIMENS

Lookup = Callable[[str], Exported]


def _has_modelopt() -> bool:
    try:
        environments.interpreter("modelopt")
    except (MissingDependencyError, ConfigError):
        return False
    return True


NEEDS_MODELOPT = pytest.mark.skipif(
    not _has_modelopt(),
    reason="needs SGLP_PYTHON_MODELOPT, an interpreter that has ModelOpt (sglp-deploy env create modelopt makes one)",
)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The worker's own functions, in this interpreter; ModelOpt itself is imported by none of those called here."""
    monkeypatch.setenv(workers.LOOP_VARIABLE, str(workers._LOOP_FOLDER))
    spec = importlib.util.spec_from_file_location("modelopt_worker", tensorrt_int8._WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "activations": "fp16"}, "activations='fp16' is not offered; they are int8 or fp32 here"),
        ({"activations": "int8"}, "activations is an option of int8; nothing else is calibrated"),
        ({"precision": "fp16", "calibration": "a.txt"}, "calibration is an option of int8"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_traced(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxExporter, "export", None)  # whoever calls it fails in another way
    compressor = Compressor(tiny.loaded("llama"))
    with pytest.raises(ConfigError, match=message):
        compressor.export(compressor.keep_all(), "tensorrt-kit", tmp_path / "kit", **options)
    assert list(tmp_path.iterdir()) == []


def test_rounded_weights_are_not_rounded_again(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(tiny.save_tiny(tmp_path / "model"), dtype="fp16")
    with pytest.raises(
        ConfigError, match=r"a model whose weights are fp16; they would be rounded twice; .*--dtype fp32"
    ):
        compressor.export(compressor.keep_all(), "tensorrt-kit", tmp_path / "kit", precision="int8")


def test_without_the_environment_the_error_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLP_DEPLOY_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("SGLP_PYTHON_MODELOPT", raising=False)
    monkeypatch.setattr(OnnxExporter, "export", None)
    compressor = Compressor(tiny.loaded("llama"))
    with pytest.raises(MissingDependencyError, match=r"'modelopt' is not there .*sglp-deploy env create modelopt"):
        compressor.export(compressor.keep_all(), "tensorrt-kit", tmp_path / "kit", precision="int8")


# ------------------------------------------------------------------------------------------- before and after ModelOpt


def _graph_with_quantised_activations() -> onnx.ModelProto:
    """y = DQ(Q(x)) @ DQ(w): what ModelOpt makes of one matrix."""
    weight = np.array([[1, -2], [3, 127]], dtype=np.int8)
    initializers = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array([0.5, 0.25], dtype=np.float32), "w_scale"),
        numpy_helper.from_array(np.zeros(2, dtype=np.int8), "w_zero"),
        numpy_helper.from_array(np.float32(4.0), "x_scale"),
        numpy_helper.from_array(np.int8(0), "x_zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], axis=1),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _run(model: onnx.ModelProto, x: list[float]) -> list[float]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[float] = session.run(None, {"x": np.array([x], dtype=np.float32)})[0][0].tolist()
    return found


def test_activations_are_given_back_their_type_and_weights_stay_int8(worker: ModuleType) -> None:
    model = _graph_with_quantised_activations()
    assert _run(model, [1.0, 1.0]) == [0.0, 0.0]  # 1 is a quarter of a step of 4, and rounds to nothing
    assert worker._drop_activations(model.graph) == 2
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "MatMul"]
    assert {tensor.name for tensor in model.graph.initializer} == {"w", "w_scale", "w_zero"}
    assert _run(model, [1.0, 1.0]) == [0.5 + 1.5, -0.5 + 31.75]


def test_half_of_each_row_is_calibrated_on_the_cache_of_the_other_half(
    worker: ModuleType, exported: Lookup, tmp_path: Path
) -> None:
    artifact = exported("llama").artifacts["pruned"]
    network = tmp_path / "network.onnx"
    network.write_bytes(required_inputs(artifact.path / "model.onnx"))
    shutil.copy(artifact.path / "model.onnx.data", tmp_path)  # no link: ONNX Runtime refuses data elsewhere
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    np.savez(tmp_path / "feed.npz", input_ids=ids)
    prompt, rest = worker._feeds(str(network), [str(tmp_path / "feed.npz")], 8)
    assert prompt["past_key_values.0.key"].shape[2] == 0
    assert rest["past_key_values.0.key"].shape[2] == 8
    assert rest["attention_mask"].shape == (2, 12)
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    (whole,) = worker._feeds(str(network), [str(tmp_path / "feed.npz")], 0)
    expected = session.run(["logits"], whole)[0][:, 8:]
    np.testing.assert_allclose(session.run(["logits"], rest)[0], expected, atol=1e-5)


def test_a_graph_in_which_nothing_became_int8_is_refused(exported: Lookup, tmp_path: Path) -> None:
    artifact = exported("llama").artifacts["pruned"]
    file = tmp_path / "model.onnx"
    file.write_bytes(required_inputs(artifact.path / "model.onnx"))
    with pytest.raises(BackendError, match="ModelOpt quantised nothing"):
        tensorrt_int8._restore(file, artifact)


def test_a_graph_that_lost_an_output_is_refused_by_its_name(exported: Lookup, tmp_path: Path) -> None:
    artifact = exported("llama").artifacts["pruned"]
    model = onnx.load(artifact.path / "model.onnx", load_external_data=False)
    del model.graph.output[-1]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"ModelOpt changed the outputs: present\.3\.value came or went"):
        tensorrt_int8._restore(tmp_path / "model.onnx", artifact)


def test_a_float32_graph_is_no_int8_graph(exported: Lookup) -> None:
    file = exported("llama").artifacts["pruned"].path / "model.onnx"
    with pytest.raises(BackendError, match="100% of the graph's weights are fp32, not int8"):
        tensorrt_kit.check_weight_types(file, "int8")


def test_calibration_data_that_do_not_fit_are_refused_by_name(exported: Lookup, tmp_path: Path) -> None:
    compressed = exported("llama").models["pruned"]
    artifact = exported("llama").artifacts["pruned"]
    forward = type(artifact)(**{**vars(artifact), "details": {**artifact.details, "interface": "forward"}})
    np.savez(tmp_path / "data.npz", pixels=np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"data\.npz holds pixels; the graph takes attention_mask, input_ids"):
        tensorrt_int8._calibration(compressed, forward, tmp_path / "data.npz")


# ------------------------------------------------------------------------------------------------- with ModelOpt itself


def _kit(compressor: Compressor, drop: list[int], folder: Path, **options: Any) -> tuple[Any, ParityReport]:
    plan = compressor.plan_by_hand(drop) if drop else compressor.keep_all()
    artifact = compressor.export(plan, "tensorrt-kit", folder, precision="int8", **options)
    return artifact, compressor.verify(artifact, threads=1)


@NEEDS_MODELOPT
def test_a_decoder_has_int8_weights_and_float32_activations(tmp_path: Path) -> None:
    compressor = Compressor(tiny.loaded("llama"))
    artifact, report = _kit(compressor, [1, 4], tmp_path / "kit", target="sm_86")
    assert report.passed, report.reasons
    assert (report.precision, artifact.precision) == ("int8", "int8")
    facts = artifact.details["onnx"]["quantised"]
    assert facts["by"].startswith("nvidia-modelopt 0.47")
    assert (facts["activations"], facts["calibration"][:5]) == ("fp32", "none:")
    assert artifact.weight_bytes < 0.4 * 4 * 211_000
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    kinds = {node.op_type for node in graph.node}
    assert "DequantizeLinear" in kinds
    assert "QuantizeLinear" not in kinds
    # The rounding is seen: float32 bounds would refuse it, and so would a manifest that says fp32.
    lying = type(artifact)(**{**vars(artifact), "precision": "fp32"})
    reasons = compressor.verify(lying, threads=1).reasons
    assert any(reason.startswith("wrong dtype: ") or "KL" in reason for reason in reasons)


@NEEDS_MODELOPT
@pytest.mark.slow
def test_activations_are_calibrated_on_text_with_and_without_a_cache(tmp_path: Path) -> None:
    compressor = Compressor(tiny.loaded("llama"))
    artifact, report = _kit(compressor, [1, 4], tmp_path / "kit", activations="int8")
    assert report.passed, report.reasons
    facts = artifact.details["onnx"]["quantised"]
    assert facts["calibration"] == "4096 tokens of builtin:calibration, half of each row on a cache"
    graph = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}


@NEEDS_MODELOPT
def test_an_image_classifier_is_quantised_with_its_activations(tmp_path: Path) -> None:
    module = next(each for each in SPECIMENS if each.name == "resnet").build()
    compressor = Compressor(LoadedModel(module, None, source_of(module, "resnet")))
    artifact, report = _kit(compressor, [], tmp_path / "kit")
    assert report.passed, report.reasons
    facts = artifact.details["onnx"]["quantised"]
    assert facts["activations"] == "int8"
    assert facts["elements"]["int8"] > 8 * facts["elements"]["float32"]
