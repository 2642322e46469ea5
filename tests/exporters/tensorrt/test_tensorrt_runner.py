"""What the engine's runner binds where, and the classic way to build, on a TensorRT that computes with ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensorrt_fake
import tiny
from exports import Exported
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError
from sglp_deploy.materialize import CompressedModel, materialize
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import GeneratingRunner, Runner
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.tensorrt import build as tensorrt_build
from sglp_exporters.tensorrt import runner as tensorrt_runner
from sglp_exporters.tensorrt.exporter import TensorRTKitExporter
from sglp_exporters.tensorrt.runner import TensorRTForwardRunner, TensorRTRunner, runner_for
from zoo import main_output
from zoo_vision import SPECIMENS

ATOL = 5e-5  # float32 rounding on logits of about 0.4
LIMITS = {"max_batch": 3, "max_prompt": 40, "max_total": 64}


@dataclass
class Built:
    """A model, its kit, and what the fake built of it."""

    model: CompressedModel
    kit: ExportArtifact
    engine: Path
    report: dict[str, Any]

    def runner(self) -> Runner:
        return runner_for(self.kit, self.engine, tensorrt_build.CLASSIC, "cpu")


@pytest.fixture(scope="module", autouse=True)
def _fake_tensorrt() -> Iterator[None]:
    """Make ``import tensorrt`` find the fake, on a machine that seems to have an H100."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, tensorrt_build.CLASSIC, tensorrt_fake)
        patch.setattr(tensorrt_build, "package_here", lambda: tensorrt_build.CLASSIC)
        patch.setattr(tensorrt_build, "device_capability", lambda: "sm_90")
        yield


def _built(model: CompressedModel, folder: Path, **limits: int) -> Built:
    kit = TensorRTKitExporter().export(model, folder, target="h100", **limits)
    report = tensorrt_build.build(folder, folder / "built" / "sm_90")
    return Built(model, kit, folder / "built" / "sm_90" / "model.engine", report)


@pytest.fixture(scope="module")
def decoder(exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> Built:
    one = exported("llama")
    OnnxExporter._template = one.template
    return _built(one.models["pruned"], tmp_path_factory.mktemp("kit") / "kit", **LIMITS)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Built:
    specimen = next(one for one in SPECIMENS if one.name == "vit")
    module = specimen.build()
    ((stack, keep),) = specimen.keep.items()
    model = materialize(module, tiny.plan_for(module, keep, stack=stack), tiny.source(module))
    return _built(model, tmp_path_factory.mktemp("kit") / "kit", max_batch=2)


def _ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * 100 + length).integers(0, 256, (rows, length))


@pytest.mark.parametrize("prompt", ["1", "17", "40", "padded"])
def test_the_runner_feeds_the_engine_what_the_torch_model_gets(decoder: Built, prompt: str) -> None:
    if prompt == "padded":
        mask = (np.arange(20) >= np.array([[7], [0], [18]])).astype(np.int64)
        ids = _ids(3, 20) * mask
    else:
        ids, mask = _ids(2, int(prompt)), None
    real = np.ones_like(ids, dtype=bool) if mask is None else mask == 1
    steps = _ids(len(ids), 64 - ids.shape[1])
    with decoder.runner() as runner, TorchRunner(decoder.model.module) as reference:
        assert isinstance(runner, GeneratingRunner)
        got = runner.prefill(ids, mask, all_positions=True)
        wanted = reference.prefill(ids, mask, all_positions=True)
        assert got.shape == wanted.shape
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[real], wanted[real], atol=ATOL)
        np.testing.assert_allclose(runner.prefill(ids, mask), reference.prefill(ids, mask), atol=ATOL)
        for step in range(steps.shape[1]):
            got, wanted = runner.decode(steps[:, step]), reference.decode(steps[:, step])
            np.testing.assert_allclose(got, wanted, atol=ATOL, err_msg=f"step {step}")


def test_a_second_prompt_of_another_size_starts_from_an_empty_cache(decoder: Built) -> None:
    with decoder.runner() as runner, TorchRunner(decoder.model.module) as reference:
        assert isinstance(runner, GeneratingRunner)
        for rows, length in ((1, 30), (3, 40), (2, 12)):  # the second needs more room than the first had
            ids = _ids(rows, length)
            np.testing.assert_allclose(runner.prefill(ids), reference.prefill(ids), atol=ATOL)
            for step in range(3):
                got, wanted = runner.decode(ids[:, step]), reference.decode(ids[:, step])
                np.testing.assert_allclose(got, wanted, atol=ATOL)


def test_decoding_allocates_no_cache_memory_and_swaps_two_buffers(decoder: Built) -> None:
    with decoder.runner() as runner:
        assert isinstance(runner, TensorRTRunner)
        runner.prefill(_ids(2, 9))
        addresses = {tensor.data_ptr() for tensor in (*runner._read.values(), *runner._write.values())}
        before = {name: tensor.data_ptr() for name, tensor in runner._read.items()}
        runner.decode(np.array([1, 2]))
        assert {name: tensor.data_ptr() for name, tensor in runner._write.items()} == before
        runner.decode(np.array([1, 2]))
        assert {tensor.data_ptr() for tensor in (*runner._read.values(), *runner._write.values())} == addresses


def test_forward_gives_every_output_and_an_empty_cache_may_be_left_out(decoder: Built) -> None:
    ids = _ids(2, 9)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None].repeat(2, 0)}
    with decoder.runner() as runner, TorchRunner(decoder.model.module) as reference:
        outputs = runner.forward(feed)
        np.testing.assert_allclose(outputs["logits"][:, 0], reference.prefill(ids), atol=ATOL)
        assert set(outputs) == {spec.name for spec in decoder.kit.outputs}
        assert outputs["present.0.key"].shape == (2, 2, 9, 32)
        with pytest.raises(BackendError, match=r"the engine has no input 'pixel_values'; it takes input_ids, "):
            runner.forward({**feed, "pixel_values": ids})


def test_a_position_counted_from_the_end_reaches_the_engine_counted_from_the_start(decoder: Built) -> None:
    ids = _ids(2, 9)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None].repeat(2, 0)}
    with decoder.runner() as runner, TorchRunner(decoder.model.module) as reference:
        every = reference.prefill(ids, all_positions=True)
        kept = runner.forward({**feed, "logits_to_keep": np.array([-9, 3, -1])})["logits"]
        np.testing.assert_allclose(kept, every[:, [0, 3, 8]], atol=ATOL)


def test_each_profile_has_scratch_memory_of_its_own_size(decoder: Built) -> None:
    tensorrt_fake.contexts.clear()
    with decoder.runner():
        assert [context.how for context in tensorrt_fake.contexts] == ["on profile change"] * 2


def test_tensorrt_for_rtx_keeps_one_set_of_kernels_while_it_decodes(
    decoder: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step has a new shape; kernels compiled in the background would change the times in the middle of a run."""
    monkeypatch.setitem(sys.modules, tensorrt_build.RTX, tensorrt_fake)
    tensorrt_fake.contexts.clear()
    with runner_for(decoder.kit, decoder.engine, tensorrt_build.RTX, "cpu"):
        prefill, decode = (context.how for context in tensorrt_fake.contexts)
    assert prefill.allocation == decode.allocation == "on profile change"
    assert prefill.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert decode.dynamic_shapes_kernel_specialization_strategy == "none"


@pytest.mark.tensorrt
def test_the_runtime_settings_asked_of_tensorrt_for_rtx_exist_there() -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (the extra of that name)")
    assert {"EAGER", "NONE"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)
    assert "ON_PROFILE_CHANGE" in trt.ExecutionContextAllocationStrategy.__members__
    settings = {"set_execution_context_allocation_strategy", "dynamic_shapes_kernel_specialization_strategy"}
    assert settings <= set(dir(trt.IRuntimeConfig))
    assert hasattr(trt.ICudaEngine, "create_runtime_config")


def test_an_image_model_runs_forward_and_does_not_generate(vision: Built) -> None:
    pixels = torch.randn(2, *vision.kit.inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    with vision.runner() as runner, torch.no_grad():
        assert isinstance(runner, TensorRTForwardRunner)
        assert not isinstance(runner, GeneratingRunner)
        got = runner.forward({vision.kit.inputs[0].name: pixels.numpy()})
        runner.synchronize()
        (values,) = got.values()
        np.testing.assert_allclose(values, main_output(vision.model.module(pixels)).numpy(), atol=ATOL)
        with pytest.raises(
            BackendError, match=r"the engine's forward profile takes \(1, 3.* export again with greater"
        ):
            runner.forward({vision.kit.inputs[0].name: pixels.repeat(2, 1, 1, 1).numpy()})


# ------------------------------------------------------------------------------------------------------- refusals


def test_sizes_beyond_the_profile_are_refused_by_name(decoder: Built) -> None:
    with decoder.runner() as runner:
        assert isinstance(runner, TensorRTRunner)
        with pytest.raises(BackendError, match=r"input_ids has shape \(4, 9\); the engine's prefill profile takes"):
            runner.prefill(_ids(4, 9))
        with pytest.raises(BackendError, match=r"input_ids has shape \(1, 41\); .* greater max_batch, max_prompt or"):
            runner.prefill(_ids(1, 41))
        runner.prefill(_ids(1, 40))
        for _ in range(24):
            runner.decode(np.array([3]))
        with pytest.raises(BackendError, match=r"attention_mask has shape \(1, 65\); the engine's decode profile"):
            runner.decode(np.array([3]))


def test_a_runner_says_when_it_is_used_in_the_wrong_order(decoder: Built) -> None:
    runner = decoder.runner()
    assert isinstance(runner, TensorRTRunner)
    with pytest.raises(BackendError, match=r"decode was called before prefill; .*; call prefill first"):
        runner.decode(np.array([1]))
    with runner:
        pass
    with runner:
        pass
    with pytest.raises(BackendError, match=r"the runner is not active; .*; use it as a context manager"):
        runner.forward({"input_ids": _ids(1, 3)})


def test_an_engine_of_another_tensorrt_is_refused(decoder: Built, tmp_path: Path) -> None:
    other = tmp_path / "model.engine"
    other.write_bytes(b"vtrt\nsomething\nelse")
    with (
        pytest.raises(
            BackendError, match=r"tensorrt 10.99-fake cannot load .*; it was built by another version or for"
        ),
        runner_for(decoder.kit, other, tensorrt_build.CLASSIC, "cpu"),
    ):
        pass
    with (
        pytest.raises(BackendError, match=r"needs no_such_tensorrt, which is not here; .*; install it"),
        runner_for(decoder.kit, decoder.engine, "no_such_tensorrt", "cpu"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device; there is one")
def test_without_a_gpu_the_engine_is_not_run_and_the_onnx_is_offered(decoder: Built) -> None:
    runner = TensorRTKitExporter().open(decoder.kit, device="cuda")
    assert isinstance(runner, TensorRTRunner)
    with (
        pytest.raises(BackendError, match=r"there is no CUDA device to run .* use --device cpu for the ONNX it was"),
        runner,
    ):
        pass


# ----------------------------------------------------------------------------------------- building the classic way


def test_classic_tensorrt_builds_strongly_typed_without_tf32_for_the_device_it_runs_on(decoder: Built) -> None:
    assert decoder.report["runtime"]["package"] == "tensorrt"
    assert decoder.report["runtime"]["version"] == "10.99-fake"
    assert decoder.report["runtime"]["device"] == "sm_90"
    assert decoder.report["targets"] == ["sm_90"]
    assert decoder.report["runtime"]["layer_information"] == "layers.json"
    assert (decoder.engine.parent / "layers.json").read_text() == '{"Layers": []}'
    assert decoder.report["executed"] is False
    config = tensorrt_fake.configs[0]
    assert config.cleared == ["tf32"]
    assert not hasattr(config, "hardware_compatibility_level")
    assert [sorted(profile.shapes) for profile in config.profiles] == [
        sorted(spec.name for spec in decoder.kit.inputs)
    ] * 2


def test_portable_means_every_device_since_ampere(decoder: Built, tmp_path: Path) -> None:
    tensorrt_build.build(decoder.kit.path, tmp_path, targets=["portable"])
    assert tensorrt_fake.configs[-1].hardware_compatibility_level == "ampere+"


def test_a_timing_cache_is_read_and_written_back(decoder: Built, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known ")
    report = tensorrt_build.build(decoder.kit.path, tmp_path / "out", timing_cache=cache)
    assert report["runtime"]["timing_cache"] == "used"
    assert cache.read_bytes() == b"known measured"


def test_a_default_that_tensorrt_folds_away_is_noticed(decoder: Built, tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    folder.mkdir()
    for file in decoder.kit.path.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    kit = tensorrt_build.read_kit(folder)
    kit["network"] = "model.onnx"  # the graph in which the input has a default
    kit["files"]["model.onnx"] = {"sha256": tensorrt_build.sha256(folder / "model.onnx"), "bytes": 0}
    (folder / "kit.json").write_text(json.dumps(kit))
    with pytest.raises(tensorrt_build.Refused, match=r"TensorRT sees the inputs .*, the kit promises .*logits_to_keep"):
        tensorrt_build.build(folder, tmp_path / "out")


# --------------------------------------------------------------------------------------------- an engine out of a kit


def test_a_kit_runs_the_engine_that_was_built_in_its_folder(decoder: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(tensorrt_runner, "runner_for", lambda *arguments: seen.append(arguments))
    TensorRTKitExporter().open(decoder.kit, device="cuda:1")
    assert seen == [(decoder.kit, decoder.engine, "tensorrt", "cuda:1")]


def test_an_engine_that_is_not_of_this_kit_is_refused(decoder: Built) -> None:
    whole = decoder.engine.read_bytes()
    try:
        decoder.engine.write_bytes(whole + b"x")
        with pytest.raises(ArtifactError, match="is not an engine of this kit, or was altered; its digests differ"):
            TensorRTKitExporter().open(decoder.kit, device="cuda")
    finally:
        decoder.engine.write_bytes(whole)
