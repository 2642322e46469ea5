"""The TensorRT exporters: what lies in the folder, what its words promise, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import tiny
from exports import Exported, compressed, share_traces
from sglp_deploy import Compressor, registry
from sglp_deploy.artifact import ExportArtifact, TensorSpec
from sglp_deploy.errors import ArtifactError, BackendError, ConfigError, MissingDependencyError
from sglp_deploy.materialize import CompressedModel, materialize
from sglp_deploy.models import LoadedModel
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import Exporter, GeneratingRunner
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.onnx.precision import in_precision
from sglp_exporters.tensorrt import build as tensorrt_build
from sglp_exporters.tensorrt import exporter as tensorrt
from sglp_exporters.tensorrt import kit as tensorrt_kit
from sglp_exporters.tensorrt.exporter import TensorRTExporter, TensorRTKitExporter
from zoo import main_output
from zoo_vision import SPECIMENS

PACKAGE = tensorrt_build.package_here()
NEEDS_RTX = pytest.mark.skipif(
    PACKAGE != tensorrt_build.RTX, reason="needs tensorrt_rtx, which builds without a GPU (pip install tensorrt-rtx)"
)
ATOL = 5e-5  # float32 rounding on logits of about 0.4
KIT_FILES = ["build.py", "kit.json", "model.onnx", "model.onnx.data", "network.onnx", "sglp_plan.json"]

Lookup = Callable[[str], Exported]


@dataclass
class Made:
    """A model and an artifact of it."""

    loaded: LoadedModel
    model: CompressedModel
    artifact: ExportArtifact


def _ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * 100 + length).integers(0, 256, (rows, length))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A float16 engine for two kinds of card, of a float32 model that lost one of two layers."""
    loaded = tiny.loaded("llama", num_hidden_layers=2)
    model = materialize(loaded.module, tiny.plan_for(loaded.module, (1,)), loaded.source)
    folder = tmp_path_factory.mktemp("engine") / "engine"
    with pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        made = TensorRTExporter().export(model, folder, target="sm_86,rtx-4090", precision="fp16", max_batch=4)
    return Made(loaded, model, made)


@pytest.fixture(scope="module")
def kit(exported: Lookup, tmp_path_factory: pytest.TempPathFactory) -> Made:
    OnnxExporter._template = exported("llama").template
    model = exported("llama").models["pruned"]
    folder = tmp_path_factory.mktemp("kit") / "kit"
    return Made(tiny.loaded("llama"), model, TensorRTKitExporter().export(model, folder, target="jetson-orin"))


def _copy(artifact: ExportArtifact, folder: Path) -> Path:
    folder.mkdir()
    for file in artifact.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


# -------------------------------------------------------------------------------------------------------- an engine


@pytest.mark.tensorrt
@NEEDS_RTX
def test_an_engine_lies_beside_the_onnx_it_was_built_from_and_says_that_it_was_not_executed(engine: Made) -> None:
    artifact = ExportArtifact.load(engine.artifact.path)
    assert sorted(artifact.files) == sorted([*KIT_FILES, "build.json", "model.engine"])
    assert (artifact.format, artifact.precision, artifact.n_layers) == ("tensorrt", "fp16", 1)
    assert artifact.plan_digest == engine.model.plan.digest()
    assert (artifact.path / "model.engine").read_bytes()[:4] == b"vtrt"  # the magic number of TensorRT's plans
    details = artifact.details
    assert details["executed"] is False
    assert details["execution"].startswith("built and not executed: ")
    assert details["runner"] == "ONNX Runtime on the ONNX this engine was built from; engine not executed"
    assert details["targets"] == ["sm_86", "sm_89"]
    assert details["build"]["engine"]["sha256"] == artifact.files["model.engine"].sha256
    assert details["build"]["network"]["sha256"] == artifact.files["network.onnx"].sha256
    assert details["build"]["audit"]["verdict"] == "cannot tell"  # 0.2 MB of weights
    assert artifact.producer["tensorrt_rtx"] == details["build"]["runtime"]["version"]
    # Half of the weights' bytes of float32, and a few constants.
    assert 0 <= artifact.weight_bytes - 2 * engine.model.n_parameters < 4096
    assert {spec.dtype for spec in artifact.inputs if spec.name.startswith("past")} == {"float16"}


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_machine_without_a_gpu_certifies_the_onnx_and_says_so(engine: Made) -> None:
    report = Compressor(engine.loaded).verify(engine.artifact, threads=1)
    assert report.passed, report.reasons
    assert report.artifact_digest == engine.artifact.digest
    assert (report.format, report.precision) == ("tensorrt", "fp16")
    assert report.runner == "ONNX Runtime on the ONNX this engine was built from; engine not executed"


def test_a_kit_is_certified_by_its_onnx_and_the_certificate_says_so(kit: Made) -> None:
    report = Compressor(kit.loaded).verify(kit.artifact, threads=1)
    assert report.passed, report.reasons
    assert (report.format, report.precision) == ("tensorrt-kit", "fp32")
    assert report.runner == "ONNX Runtime on the ONNX this kit builds from; no engine was built"


@pytest.mark.tensorrt
@NEEDS_RTX
def test_what_stands_in_for_an_engine_is_marked_for_whoever_would_time_it(engine: Made) -> None:
    assert TensorRTExporter().open(engine.artifact, device="cpu").stands_in_for == "tensorrt"  # type: ignore[attr-defined]


@pytest.mark.tensorrt
@NEEDS_RTX
def test_an_engine_for_images_is_built_of_a_forward_graph(tmp_path: Path) -> None:
    specimen = next(one for one in SPECIMENS if one.name == "resnet")
    module = specimen.build()
    ((stack, keep),) = specimen.keep.items()
    model = materialize(module, tiny.plan_for(module, keep, stack=stack), tiny.source(module))
    artifact = TensorRTExporter().export(model, tmp_path / "engine", target="sm_86,sm_89", max_batch=2)
    assert sorted(artifact.files) == sorted({*KIT_FILES, "build.json", "model.engine"} - {"network.onnx"})
    profiles = json.loads((artifact.path / "kit.json").read_text())["profiles"]
    shape = [3, *artifact.inputs[0].shape[2:]]
    assert profiles == [
        {"name": "forward", "shapes": {"pixel_values": {"min": [1, *shape], "opt": [1, *shape], "max": [2, *shape]}}}
    ]
    pixels = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with TensorRTExporter().open(artifact, device="cpu") as runner, torch.no_grad():
        assert not isinstance(runner, GeneratingRunner)
        (values,) = runner.forward({"pixel_values": pixels.numpy()}).values()
        np.testing.assert_allclose(values, main_output(model.module(pixels)).numpy(), atol=ATOL)


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_build_that_is_refused_names_the_node_and_leaves_nothing(exported: Lookup, tmp_path: Path) -> None:
    OnnxExporter._template = exported("llama").template
    # Turing has no float32 matrix product in TensorRT for RTX.
    with pytest.raises(BackendError, match=r"refuses to build it for sm_75 at node '.+'; .*FP32 GEMM is not supported"):
        TensorRTExporter().export(compressed("llama", (0,)), tmp_path / "engine", target="sm_75")
    assert list(tmp_path.iterdir()) == []


def _shadow(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Make the builder's process import another tensorrt_rtx."""
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(tensorrt_build, "package_here", lambda: tensorrt_build.RTX)


@pytest.mark.skipif(PACKAGE == tensorrt_build.CLASSIC, reason="the builder would import classic TensorRT first")
def test_a_builder_that_crashes_is_reported_and_leaves_nothing(
    exported: Lookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxExporter._template = exported("llama").template
    _shadow(tmp_path / "fake", monkeypatch, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(BackendError, match="TensorRT's builder was ended by signal 11; it said nothing; try another"):
        TensorRTExporter().export(exported("llama").models["pruned"], tmp_path / "engine", target="sm_86")
    assert not (tmp_path / "engine").exists()


# ------------------------------------------------------------------------------------------------------ a build kit


def test_a_kit_holds_what_the_device_needs_and_names_the_device(kit: Made) -> None:
    artifact = ExportArtifact.load(kit.artifact.path)
    assert sorted(artifact.files) == KIT_FILES
    assert artifact.format == "tensorrt-kit"
    assert artifact.details["targets"] == ["sm_87"]
    assert artifact.details["execution"] == "no engine was built; run build.py on the target device"
    assert (artifact.path / "build.py").read_text() == Path(tensorrt_build.__file__).read_text()
    written = json.loads((artifact.path / "kit.json").read_text())
    assert {name: record["sha256"] for name, record in written["files"].items()} == {
        name: artifact.files[name].sha256 for name in ("network.onnx", "model.onnx.data")
    }


def test_a_kit_has_a_profile_for_prompts_and_one_for_single_tokens(kit: Made) -> None:
    profiles = {
        profile["name"]: profile["shapes"]
        for profile in json.loads((kit.artifact.path / "kit.json").read_text())["profiles"]
    }
    # The tiny model has 256 positions; TensorRT is told the least, the typical and the greatest size of each input.
    assert profiles["prefill"]["input_ids"] == {"min": [1, 1], "opt": [1, 128], "max": [8, 256]}
    assert profiles["decode"]["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [8, 1]}
    assert profiles["decode"]["attention_mask"] == {"min": [1, 1], "opt": [1, 128], "max": [8, 256]}
    assert profiles["decode"]["past_key_values.0.key"] == {
        "min": [1, 2, 0, 32],
        "opt": [1, 2, 127, 32],
        "max": [8, 2, 255, 32],
    }
    for shapes in profiles.values():
        for part in ("min", "opt", "max"):
            new, past = shapes["input_ids"][part][1], shapes["past_key_values.0.key"][part][2]
            assert shapes["attention_mask"][part][1] == new + past


def test_the_graph_tensorrt_gets_computes_what_the_certified_graph_computes(kit: Made) -> None:
    ids = _ids(2, 9)
    feed: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(9)[None].repeat(2, 0),
        "logits_to_keep": np.arange(9),
    }
    for spec in kit.artifact.inputs:
        if spec.name.startswith("past"):
            feed[spec.name] = np.zeros((2, spec.shape[1], 0, spec.shape[3]), spec.dtype)  # type: ignore[arg-type]
    results = [
        onnxruntime.InferenceSession(str(kit.artifact.path / name), providers=["CPUExecutionProvider"]).run(None, feed)
        for name in ("model.onnx", "network.onnx")
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    network = onnx.load(str(kit.artifact.path / "network.onnx"), load_external_data=False).graph
    assert not {value.name for value in network.input} & {tensor.name for tensor in network.initializer}


@pytest.mark.tensorrt
@NEEDS_RTX
def test_a_kit_for_a_device_this_tensorrt_cannot_serve_says_so_and_builds_for_another(
    kit: Made, tmp_path: Path
) -> None:
    folder = _copy(kit.artifact, tmp_path / "kit")
    done = subprocess.run([sys.executable, str(folder / "build.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: TensorRT for RTX builds no engine for sm_87 (jetson-orin, ")
    command = [sys.executable, str(folder / "build.py"), "--target", "sm_86"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "built" / "sm_86" / "model.engine").is_file()
    ExportArtifact.load(folder)  # what was added does not make the kit another one


def test_an_engine_is_not_run_before_it_is_built(kit: Made) -> None:
    with pytest.raises(ArtifactError, match=r"there is no engine in .*built; .*; run python build.py there"):
        TensorRTKitExporter().open(kit.artifact, device="cuda")


def test_the_option_kit_of_the_engine_exporter_writes_a_kit(exported: Lookup, kit: Made, tmp_path: Path) -> None:
    OnnxExporter._template = exported("llama").template
    same = TensorRTExporter().export(kit.model, tmp_path / "kit", target="jetson-orin", kit=True)
    assert same.digest == kit.artifact.digest


def test_a_graph_that_is_not_the_one_tensorrt_was_given_gets_no_certificate(kit: Made, tmp_path: Path) -> None:
    folder = _copy(kit.artifact, tmp_path / "kit")
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    graph.producer_name = "someone else"
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    altered = ExportArtifact.load(kit.artifact.path)
    object.__setattr__(altered, "path", folder)
    with pytest.raises(ArtifactError, match=r"is not the one TensorRT was given; .*; export it again"):
        TensorRTKitExporter().open(altered, device="cpu")


# -------------------------------------------------------------------------------------------------------- precision


def test_half_precision_is_what_transformers_loads_a_checkpoint_as(tmp_path: Path) -> None:
    model = compressed("llama", (0, 3))
    model.module.save_pretrained(tmp_path)  # type: ignore[operator]
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    got = in_precision(model, "fp16").module
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(got, kind)()), dict(getattr(wanted, kind)())
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
    assert got.config.dtype == torch.float16  # type: ignore[union-attr]
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    assert in_precision(model, "fp32") is model
    assert in_precision(model, None) is model


def test_what_a_family_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    module = T5ForConditionalGeneration(config).eval()
    module.save_pretrained(tmp_path)
    wanted = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    keep = tuple(range(2))
    model = materialize(module, tiny.plan_for(module, keep), tiny.source(module))
    got = in_precision(model, "fp16").module
    types = {name: parameter.dtype for name, parameter in got.named_parameters()}
    assert types == {name: parameter.dtype for name, parameter in wanted.named_parameters()}
    assert set(types.values()) == {torch.float16, torch.float32}


def test_a_weight_beyond_float16_is_refused() -> None:
    module = tiny.model("llama")
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    model = materialize(module, tiny.plan_for(module, (0, 2)), tiny.source(module))
    with pytest.raises(
        BackendError, match=r"layers.1.mlp.up_proj.weight holds 1e\+05, beyond fp16; .* precision='fp32'"
    ):
        in_precision(model, "fp16")


def test_a_graph_whose_weights_are_of_another_type_is_refused(kit: Made) -> None:
    tensorrt_kit.check_weight_types(kit.artifact.path / "model.onnx", "fp32")
    with pytest.raises(BackendError, match=r"100% of the graph's weights are fp32, not fp16; TensorRT takes precision"):
        tensorrt_kit.check_weight_types(kit.artifact.path / "model.onnx", "fp16")


def test_bfloat16_is_refused_as_the_onnx_exporter_refuses_it() -> None:
    for name in ("tensorrt", "tensorrt-kit"):
        exporter: Any = TensorRTExporter() if name == "tensorrt" else TensorRTKitExporter()
        exporter.check_precision("fp16")
        with pytest.raises(ConfigError, match="the weights are bfloat16"):
            exporter.check_precision("bf16")


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prcision": "fp16"}, "precision"),
        ({"precision": "int4"}, "precision='int4' is not offered; engines are made of fp32, fp16 or int8 graphs; pass"),
        ({"target": "gtx-1080"}, "there is no target 'gtx-1080' known here; targets are compute capabilities"),
        ({"max_batch": 0}, "max_batch=0 is not a positive whole number"),
        ({"max_prompt": True}, "max_prompt=True is not a positive whole number"),
        ({"max_total": 8, "max_prompt": 9}, "max_total=8 is below max_prompt=9; it counts prompt and answer; pass a"),
        ({"max_total": 300}, "max_total=300 is more than the 256 tokens the model has positions for; .* at most 256"),
    ],
)
@pytest.mark.parametrize("exporter", [TensorRTExporter, TensorRTKitExporter])
def test_a_wrong_option_is_refused_before_anything_is_traced(
    exporter: Callable[[], Exporter],
    options: dict[str, Any],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OnnxExporter, "export", None)
    if exporter is TensorRTExporter and PACKAGE != tensorrt_build.RTX and "max" in next(iter(options)):
        pytest.skip("needs tensorrt_rtx: without it the target is refused first")
    with pytest.raises(ConfigError, match=words):
        exporter().export(compressed("llama", (0,)), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("window", "limits"),
    [(128, (1024, 2048)), (1024, (1088, 2048)), (4096, (4160, 4192)), (8192, (1024, 2048)), (None, (1024, 2048))],
)
def test_by_default_an_engine_has_room_for_its_certificate_beyond_the_window(
    window: int | None, limits: tuple[int, int]
) -> None:
    """verify tries a prompt 64 tokens longer than a window of up to 4,096, and 32 tokens after it."""
    positions = {"max_position_embeddings": 32_768}
    module = (
        tiny.model("llama", **positions) if window is None else tiny.model("gemma3", sliding_window=window, **positions)
    )
    found = tensorrt._limits(module, tensorrt._options("tensorrt", {}))
    assert (found["max_prompt"], found["max_total"]) == limits


@NEEDS_RTX
@pytest.mark.parametrize("target", ["jetson-orin", "h100"])
def test_a_device_that_needs_classic_tensorrt_is_refused_before_anything_is_traced(target: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"such devices need classic TensorRT.*; write a build kit \(--to tensorrt-kit"
    ):
        TensorRTExporter().export(compressed("llama", (0,)), tmp_path / "out", target=target)


def _artifact(*sizes: str) -> ExportArtifact:
    inputs = (TensorSpec("x", "int64", sizes),)
    return ExportArtifact(Path(), "onnx", {}, inputs, (), "fp32", 0, 1, "", {})


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"sizes": {"sequence": (8, 4, 2)}}, r"sizes\['sequence'\]=\(8, 4, 2\) is not \(least, typical, greatest\)"),
        ({"sizes": {"width": (1, 2, 3)}}, "sizes names width; the graph's sizes are batch, sequence; name one of"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(limits: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"max_batch": 2, "max_prompt": 16, "max_total": 32, "sizes": {}} | limits
    with pytest.raises(ConfigError, match=words):
        tensorrt_kit.size_ranges(_artifact("batch", "sequence"), **settings)


def test_a_size_nothing_is_known_of_must_be_given() -> None:
    settings: dict[str, Any] = {"max_batch": 2, "max_prompt": 16, "max_total": 32}
    with pytest.raises(
        ConfigError, match=r"nothing is known of the size width; .*; pass sizes=\{'width': \(1, 8, 64\)\}"
    ):
        tensorrt_kit.size_ranges(_artifact("batch", "width"), sizes={}, **settings)
    found = tensorrt_kit.size_ranges(_artifact("batch", "width"), sizes={"width": (1, 5, 9)}, **settings)
    assert found == {"forward": {"batch": (1, 1, 2), "width": (1, 5, 9)}}


def test_without_any_tensorrt_the_exporter_says_what_to_install_and_kits_still_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_build, "package_here", lambda: None)
    monkeypatch.setattr(registry, "_importable", lambda package: not package.startswith("tensorrt"))
    with pytest.raises(
        MissingDependencyError, match=r"exporter 'tensorrt' needs tensorrt; not installed here; pip install"
    ):
        registry.exporter("tensorrt")
    assert isinstance(registry.exporter("tensorrt-kit"), TensorRTKitExporter)


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(
    PACKAGE is None or not torch.cuda.is_available(), reason="needs TensorRT and a CUDA device that it supports"
)
def test_a_real_engine_computes_what_the_torch_model_computes(tmp_path: Path) -> None:
    model = compressed("llama", tiny.KEEP["llama"])
    artifact = TensorRTExporter().export(model, tmp_path / "engine", target="current", max_batch=3)
    ids = _ids(2, 17)
    runner = TensorRTExporter().open(artifact, device="cuda")
    with runner, TorchRunner(model.module) as reference:
        assert isinstance(runner, GeneratingRunner)
        np.testing.assert_allclose(runner.prefill(ids), reference.prefill(ids), atol=1e-3)
        for step in range(17):
            got, wanted = runner.decode(ids[:, step]), reference.decode(ids[:, step])
            np.testing.assert_allclose(got, wanted, atol=1e-3)
