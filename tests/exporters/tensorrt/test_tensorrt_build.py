"""The stand-alone build script: targets, the audit by size, and what a real TensorRT refuses and why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sglp_exporters.tensorrt import build as tensorrt_build
from sglp_exporters.tensorrt.build import CLASSIC, RTX, Refused, audit_weights, build, check_targets, target_names

PACKAGE = tensorrt_build.package_here()
NEEDS_TENSORRT = pytest.mark.skipif(PACKAGE is None, reason="needs tensorrt or tensorrt_rtx (pip install tensorrt-rtx)")
NEEDS_RTX = pytest.mark.skipif(PACKAGE != RTX, reason="needs tensorrt_rtx alone: classic TensorRT builds on GPUs only")


# ---------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        # developer.nvidia.com/cuda-gpus
        ("sm_86", "sm_86"),
        ("sm89", "sm_89"),
        ("8.9", "sm_89"),
        ("12.0", "sm_120"),
        ("RTX 4090", "sm_89"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "sm_89"),
        ("rtx_3080_ti", "sm_86"),
        ("RTX 5090", "sm_120"),
        ("T4", "sm_75"),
        ("A100", "sm_80"),
        ("H100", "sm_90"),
        ("jetson-orin", "sm_87"),
        ("jetson-thor", "sm_110"),
        ("portable", "portable"),
        (" Current ", "current"),
    ],
)
def test_a_device_is_named_by_its_box_or_its_capability(name: str, capability: str) -> None:
    assert target_names(name) == (capability,)


def test_several_targets_make_one_engine_and_repetitions_count_once() -> None:
    assert target_names("sm_86,rtx-4090,sm_89") == ("sm_86", "sm_89")
    assert target_names(["rtx-3090", "l4"]) == ("sm_86", "sm_89")


@pytest.mark.parametrize("name", ["rtx-9999", "sm_13", "", "gtx-1080", "8.65"])
def test_an_unknown_target_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(Refused, match=r"there is no target .* known here; targets are compute capabilities \(sm_75, "):
        target_names(name)


@pytest.mark.parametrize("names", ["portable,sm_86", "current,portable"])
def test_a_target_that_means_any_stands_alone(names: str) -> None:
    with pytest.raises(Refused, match=r"cannot be built as one engine; 'portable' and 'current' stand alone; name"):
        target_names(names)


@pytest.mark.parametrize("name", ["jetson-orin", "h100", "jetson-thor", "b200"])
def test_what_tensorrt_for_rtx_cannot_build_is_sent_to_the_classic_one(name: str) -> None:
    with pytest.raises(
        Refused, match=r"TensorRT for RTX builds no engine for sm_.*need classic TensorRT.*tensorrt-kit"
    ):
        check_targets(target_names(name), RTX, None)


def test_tensorrt_for_rtx_builds_for_other_devices_than_this_one() -> None:
    check_targets(("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"), RTX, None)
    check_targets(("portable",), RTX, None)
    check_targets(("current",), RTX, "sm_89")
    with pytest.raises(Refused, match=r"there is no GPU in this machine to build for; .*, for example sm_89"):
        check_targets(("current",), RTX, None)


def test_classic_tensorrt_builds_for_the_gpu_it_runs_on_only() -> None:
    for targets in (("sm_90",), ("current",), ("portable",)):
        check_targets(targets, CLASSIC, "sm_90")
    with pytest.raises(Refused, match=r"builds for the GPU it runs on, sm_90, not for sm_86; write a build kit"):
        check_targets(("sm_86",), CLASSIC, "sm_90")
    with pytest.raises(Refused, match=r"not for sm_86,sm_90; write a build kit"):
        check_targets(("sm_86", "sm_90"), CLASSIC, "sm_90")
    with pytest.raises(Refused, match=r"and there is none in this machine; .* or install tensorrt-rtx instead"):
        check_targets(("sm_86",), CLASSIC, None)


# ------------------------------------------------------------------------------------------------------------ audit


def _audit(engine_mb: float, weights_mb: float, layers: int = 2000, package: str = RTX) -> dict[str, Any]:
    return audit_weights(
        engine_bytes=int(engine_mb * 1e6),
        weight_bytes=int(weights_mb * 1e6),
        precision="fp16",
        n_layers=layers,
        n_profiles=2,
        package=package,
    )


def test_an_engine_about_as_large_as_its_weights_holds_them() -> None:
    found = _audit(280, 269)
    assert (found["verdict"], found["ratio"]) == ("holds", 1.0409)


@pytest.mark.parametrize(("engine_mb", "words"), [(538 + 20, "in a wider type"), (20, "weights are missing")])
def test_a_silently_wider_or_an_empty_engine_is_refused(engine_mb: float, words: str) -> None:
    found = _audit(engine_mb, 269)
    assert found["verdict"] == "refused"
    assert words in found["words"]


def test_a_large_engine_of_classic_tensorrt_may_hold_what_its_kernels_want_beside_the_weights() -> None:
    found = _audit(538 + 20, 269, package=CLASSIC)
    assert found["verdict"] == "cannot tell"
    assert "what its kernels keep beside them" in found["words"]
    assert _audit(20, 269, package=CLASSIC)["verdict"] == "refused"


def test_where_code_outweighs_the_weights_the_audit_says_that_it_cannot_tell() -> None:
    assert _audit(4.2, 0.4)["verdict"] == "cannot tell"


# ------------------------------------------------------------------------------------------------- a real TensorRT


def _model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], outputs: dict[str, list[int]], kind: int, **weights: Any
) -> onnx.ModelProto:
    def values(shapes: dict[str, list[int]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]

    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), tensors)
    domains = {"": 23} | {node.domain: 1 for node in nodes if node.domain}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _kit(folder: Path, model: onnx.ModelProto, *, targets: list[str], precision: str, weight_bytes: int = 0) -> Path:
    """A build kit of ``model`` with the sizes its inputs have."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")

    def specs(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
                "shape": [size.dim_value for size in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    inputs = specs(model.graph.input)
    shapes = {spec["name"]: dict.fromkeys(("min", "opt", "max"), spec["shape"]) for spec in inputs}
    kit = {
        "schema": "tensorrt-kit/1",
        "network": "model.onnx",
        "precision": precision,
        "weight_bytes": weight_bytes,
        "targets": targets,
        "inputs": inputs,
        "outputs": specs(model.graph.output),
        "profiles": [{"name": "forward", "shapes": shapes}],
        "files": {"model.onnx": {"sha256": tensorrt_build.sha256(folder / "model.onnx"), "bytes": 0}},
    }
    (folder / "kit.json").write_text(json.dumps(kit))
    return folder


def _script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a kit does, where nothing can be imported but the standard library and TensorRT."""
    shutil.copy(tensorrt_build.__file__, folder / "build.py")
    alone = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['sglp_deploy', 'sglp_exporters', 'torch', 'onnx', "
        "'transformers', 'onnxruntime']));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", alone, str(folder / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"], name="/layers.3/mlp/MatMul")


def _matmul(kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return _model([MATMUL], {"x": [4, 16]}, {"y": [4, 8]}, kind, w=np.ones((16, 8), dtype))


@pytest.mark.tensorrt
@NEEDS_RTX
def test_the_script_builds_with_nothing_but_tensorrt_and_says_that_the_engine_was_not_executed(tmp_path: Path) -> None:
    folder = _kit(tmp_path / "kit", _matmul(), targets=["sm_86"], precision="fp32", weight_bytes=512)
    done = _script(folder, "--target", "rtx-4090,sm_86", "--timing-cache", str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "MB for sm_89,sm_86 in " in done.stdout
    assert done.stdout.rstrip().endswith("takes the graph, not that it computes the same")
    out = folder / "built" / "sm_89-sm_86"
    report = json.loads((out / "build.json").read_text())
    engine = (out / "model.engine").read_bytes()
    assert engine[:4] == b"vtrt"  # the magic number of TensorRT's plans
    assert report["engine"] == {
        "file": "model.engine",
        "bytes": len(engine),
        "sha256": tensorrt_build.sha256(out / "model.engine"),
    }
    assert report["executed"] is False
    assert report["network"]["layers_by_kind"]["MATRIX_MULTIPLY"] == 1
    assert report["runtime"]["package"] == "tensorrt_rtx"
    if tensorrt_build.device_capability() is None:
        assert report["runtime"]["device"] is None
        assert report["runtime"]["timing_cache"] == "not used: TensorRT for RTX measures nothing when it builds"
        assert report["runtime"]["layer_information"] == "needs a GPU that can load the engine"


@pytest.mark.tensorrt
@NEEDS_TENSORRT
@pytest.mark.parametrize(
    ("node", "words"),
    [
        (
            helper.make_node("Foo", ["x"], ["y"], name="/layers.3/Foo", domain="my.ops"),
            r"parser refuses node '/layers\.3/Foo' \(operator Foo\); INVALID_NODE: .*Plugin not found",
        ),
        (
            helper.make_node("Unique", ["x"], ["y"], name="/layers.3/Unique"),
            r"parser refuses node '/layers\.3/Unique' \(operator Unique\); UNSUPPORTED_NODE: ",
        ),
    ],
)
def test_a_node_the_parser_refuses_is_named_with_its_code(node: onnx.NodeProto, words: str, tmp_path: Path) -> None:
    model = _model([node], {"x": [4]}, {"y": [4]}, TensorProto.FLOAT)
    target = "current" if PACKAGE == CLASSIC else "sm_86"
    folder = _kit(tmp_path / "kit", model, targets=[target], precision="fp32")
    if PACKAGE == CLASSIC and tensorrt_build.device_capability() is None:
        pytest.skip("classic TensorRT needs a GPU to build")
    with pytest.raises(Refused, match=words):
        build(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_node_the_parser_refuses_without_naming_it_is_found_by_its_neighbour(tmp_path: Path) -> None:
    # How transformers' mixtures of experts add the experts up; TensorRT's error for it carries no node.
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="/layers.3/experts/Relu"),
        helper.make_node("ScatterElements", ["r", "at", "u"], ["y"], name="/layers.3/experts/Add", reduction="add"),
    ]
    model = _model(nodes, {"x": [5, 4], "u": [3, 4]}, {"y": [5, 4]}, TensorProto.FLOAT, at=np.zeros((3, 4), np.int64))
    folder = _kit(tmp_path / "kit", model, targets=["sm_86"], precision="fp32")
    words = (
        r"refuses the ScatterElements that follows node '/layers\.3/experts/Relu'; UNSUPPORTED_NODE_ATTR: Unsupported"
    )
    with pytest.raises(Refused, match=words):
        build(folder, tmp_path / "out")


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    folder = _kit(tmp_path / "kit", _matmul(), targets=["sm_86"], precision="fp32")
    (folder / "model.onnx").write_bytes(b"junk" * 9)
    kit = json.loads((folder / "kit.json").read_text())
    kit["files"]["model.onnx"]["sha256"] = tensorrt_build.sha256(folder / "model.onnx")
    (folder / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(Refused, match=r"parser refuses the file; MODEL_DESERIALIZE_FAILED: "):
        build(folder, tmp_path / "out")


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_node_the_builder_refuses_is_named(tmp_path: Path) -> None:
    # Turing has no float32 matrix product in TensorRT for RTX: the parser takes it and the build does not.
    folder = _kit(tmp_path / "turing", _matmul(), targets=["sm_75"], precision="fp32")
    with pytest.raises(
        Refused, match=r"refuses to build it for sm_75 at node '/layers\.3/mlp/MatMul'; .*FP32 GEMM is not supported"
    ):
        build(folder, tmp_path / "out")


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_node_the_builder_means_only_by_its_operator_is_found(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="/layers.3/self_attn/Attention")
    shape = [1, 2, 5, 7]  # no kernel for heads of 7
    model = _model([node], dict.fromkeys("qkv", shape), {"y": shape}, TensorProto.FLOAT)
    folder = _kit(tmp_path / "kit", model, targets=["sm_86"], precision="fp32")
    with pytest.raises(
        Refused, match=r"at node '/layers\.3/self_attn/Attention'; .*not supported by a dedicated kernel"
    ):
        build(folder, tmp_path / "out")


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_float32_engine_that_is_called_float16_is_caught_by_its_size(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)
    model = _model([MATMUL], {"x": [4, 2048]}, {"y": [4, 2048]}, TensorProto.FLOAT, w=weight)
    folder = _kit(tmp_path / "kit", model, targets=["sm_86"], precision="fp16", weight_bytes=2 * weight.size)
    with pytest.raises(
        Refused, match=r"for 8388608 bytes of fp16 weights; it holds them in a wider type; .* mislabelled"
    ):
        build(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = _kit(tmp_path / "kit", model, targets=["sm_86"], precision="fp32", weight_bytes=4 * weight.size)
    assert build(folder, tmp_path / "out")["audit"]["verdict"] == "holds"


@pytest.mark.tensorrt
@NEEDS_RTX
def test_inputs_of_another_type_than_promised_are_refused(tmp_path: Path) -> None:
    folder = _kit(tmp_path / "kit", _matmul(), targets=["sm_86"], precision="fp16")
    kit = json.loads((folder / "kit.json").read_text())
    kit["inputs"][0]["dtype"] = "float16"
    (folder / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(Refused, match=r"TensorRT takes x as DataType.FLOAT, the kit promises float16; .*fp16 engine"):
        build(folder, tmp_path / "out")


# ------------------------------------------------------------------------------------------------- damaged kits


def test_a_kit_whose_graph_was_altered_is_refused(tmp_path: Path) -> None:
    folder = _kit(tmp_path / "kit", _matmul(), targets=["sm_86"], precision="fp32")
    with (folder / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    done = _script(folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: model.onnx is missing or differs from the digest in kit.json; ")
    assert done.stderr.endswith("carry the whole folder here again\n")


@pytest.mark.parametrize("name", ["../model.onnx", "gone.onnx"])
def test_a_kit_that_names_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = _kit(tmp_path / "kit", _matmul(), targets=["sm_86"], precision="fp32")
    kit = json.loads((folder / "kit.json").read_text())
    shutil.copy(folder / "model.onnx", tmp_path / "model.onnx")
    kit["files"] = {name: kit["files"]["model.onnx"]}
    (folder / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(Refused, match="is missing or differs from the digest"):
        tensorrt_build.read_kit(folder)


def test_a_folder_that_is_no_kit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"kit.json cannot be read; .*; carry the whole folder here again"):
        tensorrt_build.read_kit(tmp_path)
    (tmp_path / "kit.json").write_text('{"schema": "tensorrt-kit/9"}')
    with pytest.raises(
        Refused, match=r"has schema 'tensorrt-kit/9'; this script reads 'tensorrt-kit/1'; use the script"
    ):
        tensorrt_build.read_kit(tmp_path)
