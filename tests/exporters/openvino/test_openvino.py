"""OpenVINO: what its folder holds, that it computes what PyTorch does, and what is refused.

The reference of every certificate here is the unpruned model with its removed layers passed over.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

import tiny
import zoo
from cli_runs import ROOT, environment
from exports import Exported
from sglp_deploy import registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import BackendError, ConfigError, StorageError
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.parity import check_parity, prompt_cases
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import Exporter, GeneratingRunner, Runner
from sglp_exporters.onnx.exporter import OnnxExporter
from sglp_exporters.openvino.exporter import OpenVinoExporter, _convert
from sglp_exporters.openvino.runner import OpenVinoRunner

openvino = pytest.importorskip("openvino", reason="needs openvino (pip install 'sglp-deploy[openvino]')")

Lookup = Callable[[str], Exported]
FILES = ["model.bin", "model.xml", "sglp_plan.json"]


def _compressor(family: str) -> Compressor:
    return Compressor(tiny.loaded(family))


def _export(exported: Lookup, family: str, folder: Path, which: str = "pruned", **options: Any) -> ExportArtifact:
    """An IR made from the trace that the whole session shares."""
    OnnxExporter._template = exported(family).template
    return OpenVinoExporter().export(exported(family).models[which], folder, **options)


@pytest.fixture(scope="module")
def ir(exported: Lookup, tmp_path_factory: pytest.TempPathFactory) -> ExportArtifact:
    return _export(exported, "llama", tmp_path_factory.mktemp("openvino") / "ir")


@pytest.fixture
def runner(ir: ExportArtifact) -> Iterator[OpenVinoRunner]:
    with OpenVinoExporter().open(ir, threads=1) as opened:
        assert isinstance(opened, OpenVinoRunner)
        yield opened


def _copy(artifact: ExportArtifact, folder: Path) -> ExportArtifact:
    shutil.copytree(artifact.path, folder)
    return ExportArtifact.load(folder)


def test_the_exporter_and_its_runner_are_what_the_protocols_ask_for(ir: ExportArtifact) -> None:
    exporter = registry.exporter("openvino")
    assert isinstance(exporter, Exporter)
    assert isinstance(exporter.open(ir), Runner)
    assert isinstance(exporter.open(ir), GeneratingRunner)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pruned_decoder_is_certified_in_float32(exported: Lookup, family: str, out: Path) -> None:
    artifact = _export(exported, family, out)
    report = _compressor(family).verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert report.precision == "fp32"
    assert report.runner.startswith("OpenVINO 20")
    assert report.runner.endswith("on CPU, computing in f32")


def test_the_folder_holds_the_ir_and_nothing_of_the_onnx_it_came_from(ir: ExportArtifact, exported: Lookup) -> None:
    assert sorted(ir.files) == FILES
    assert sorted(file.name for file in ir.path.iterdir()) == sorted([*FILES, "manifest.json"])
    onnx_made = exported("llama").artifacts["pruned"]
    assert (ir.precision, ir.n_layers, ir.plan_digest) == ("fp32", 4, onnx_made.plan_digest)
    assert (ir.inputs, ir.outputs, ir.derived_from) == (onnx_made.inputs, onnx_made.outputs, onnx_made.derived_from)
    assert ir.details["interface"] == "decoder"
    # A tied embedding once, and beside the weights only small constants.
    assert ir.weight_bytes == pytest.approx(onnx_made.weight_bytes, rel=0.001)
    assert ir.producer["openvino"].startswith("20")


def test_fp16_halves_the_weights_and_still_takes_a_float32_cache(
    exported: Lookup, ir: ExportArtifact, out: Path
) -> None:
    half = _export(exported, "llama", out, precision="fp16")
    assert half.precision == "fp16"
    assert half.weight_bytes == pytest.approx(ir.weight_bytes / 2, rel=0.001)
    assert half.inputs == ir.inputs
    report = _compressor("llama").verify(half, threads=1)
    assert report.passed, report.reasons
    assert report.precision == "fp16"
    # The rounding is seen: float32 bounds would refuse it.
    strict = _compressor("llama").verify(ExportArtifact(**{**vars(half), "precision": "fp32"}), threads=1)
    assert not strict.passed


def test_the_command_line_compares_rounded_weights_with_the_model_before_the_rounding(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(tiny.save_tiny(tmp_path / "model", num_hidden_layers=2))
    compressor.export(compressor.plan_by_hand([0]), "openvino", tmp_path / "ir", precision="fp16")
    assert main(["verify", str(tmp_path / "ir"), "--threads", "1", "-o", str(tmp_path / "parity.json"), "-q"]) == 0
    assert "1 layers, fp32" in (tmp_path / "parity.json").read_text()


@pytest.mark.parametrize("name", ["vit", "resnet", "bert"])
def test_models_without_a_cache_run_forward(name: str, out: Path) -> None:
    specimen = next(made for made in zoo.specimens() if made.name == name)
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, None, source_of(module, name)))
    kept = next(iter(specimen.keep.values()))
    plan = compressor.plan_by_hand([layer for layer in range(compressor.n_layers) if layer not in kept])
    artifact = compressor.export(plan, "openvino", out)
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert artifact.details["interface"] == "forward"
    assert "OpenVINO" in report.runner


def test_a_weight_that_was_altered_fails_the_certificate(exported: Lookup, ir: ExportArtifact, tmp_path: Path) -> None:
    damaged = _copy(ir, tmp_path / "damaged")
    pruned = exported("llama").models["pruned"].module
    norm = pruned.get_parameter("model.layers.1.input_layernorm.weight").detach().numpy()
    content = (ir.path / "model.bin").read_bytes()
    assert content.count(norm.tobytes()) == 1
    (damaged.path / "model.bin").write_bytes(content.replace(norm.tobytes(), (norm * 1.01).tobytes()))
    with OpenVinoExporter().open(damaged, threads=1) as judged, TorchRunner(pruned) as reference:
        assert isinstance(judged, OpenVinoRunner)
        assert not check_parity(damaged, judged, reference, prompt_cases(np.arange(200)), decode_steps=4).passed


def test_a_runner_that_loses_the_padding_mask_is_found_out(exported: Lookup, ir: ExportArtifact) -> None:
    class IgnoresPadding(OpenVinoRunner):
        def prefill(
            self, input_ids: NDArray[np.int64], attention_mask: Any = None, *, all_positions: bool = False
        ) -> NDArray[np.float32]:
            return super().prefill(input_ids, all_positions=all_positions)

    with IgnoresPadding(ir, threads=1) as judged, TorchRunner(exported("llama").models["pruned"].module) as reference:
        report = check_parity(ir, judged, reference, prompt_cases(np.arange(200)), decode_steps=4)
    assert [case["name"] for case in report.cases if not case["passed"]] == ["batch of 3, padded to 40"]


def test_steps_through_the_cache_equal_one_pass_over_the_whole_text(exported: Lookup, runner: OpenVinoRunner) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    with torch.no_grad():
        wanted = exported("llama").models["pruned"].module(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(runner.prefill(ids, all_positions=True), wanted, atol=2e-5)
    np.testing.assert_allclose(runner.prefill(ids[:, :7]), wanted[:, 6], atol=2e-5)
    for position in range(7, 12):
        # What runs between two steps must not touch the cache.
        positions = np.tile(np.arange(12), (2, 1))
        runner.forward({"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions})
        np.testing.assert_allclose(runner.decode(ids[:, position]), wanted[:, position], atol=2e-5)


def test_forward_takes_a_cache_and_the_positions_that_are_wanted(runner: OpenVinoRunner) -> None:
    ids = np.arange(5)[None]
    whole = runner.prefill(ids, all_positions=True)
    rest = {"attention_mask": np.ones((1, 5), dtype=np.int64), "position_ids": np.arange(5)[None]}
    found = runner.forward({"input_ids": ids, **rest, "logits_to_keep": np.array([1, 3])})
    np.testing.assert_allclose(found["logits"], whole[:, [1, 3]], atol=1e-5)
    past = {name.replace("present", "past_key_values"): value for name, value in found.items() if "present" in name}
    more = {"attention_mask": np.ones((1, 6), dtype=np.int64), "position_ids": np.array([[5]])}
    step = runner.forward({"input_ids": np.array([[7]]), **more, **past})
    runner.prefill(ids)
    np.testing.assert_allclose(step["logits"][:, 0], runner.decode(np.array([7])), atol=1e-5)


def test_an_input_that_is_left_out_is_refused(runner: OpenVinoRunner) -> None:
    with pytest.raises(BackendError, match=r"attention_mask was not given to .*; OpenVINO would run without it; give"):
        runner.forward({"input_ids": np.zeros((1, 2), dtype=np.int64)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "past_key_values.0.key",
            (2, 9, 0, 32),
            r"has shape \[2, 9, 0, 32\], .* takes \['batch', 2, 'past_seq.* batch is 2",
        ),
        (
            "position_ids",
            (1, 3),
            r"position_ids has shape \[1, 3\], .* where batch is 2, sequence is 3, total_.*; OpenVINO",
        ),
        ("input_ids", (3,), r"input_ids has shape \[3\], .* takes \['batch', 'sequence'\]"),
        ("attention_mask", (2, 4), "attention_mask covers 4 tokens, cache and input_ids hold 3"),
        ("nonsense", (2, 3), r"OpenVINO failed on .*; Port for tensor name nonsense was not found; check the inputs"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused_before_openvino_sees_them(
    runner: OpenVinoRunner, name: str, shape: tuple[int, ...], message: str
) -> None:
    ids = np.ones((2, 3), dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": ids, "position_ids": ids}
    with pytest.raises(BackendError, match=message):
        runner.forward(feed | {name: np.zeros(shape, dtype=np.int64)})


def test_a_runner_that_is_not_entered_or_not_filled_says_so(ir: ExportArtifact, runner: OpenVinoRunner) -> None:
    with pytest.raises(BackendError, match="decode was called before prefill"):
        runner.decode(np.array([1]))
    with pytest.raises(BackendError, match="the runner is not active; its network is loaded by 'with'"):
        OpenVinoExporter().open(ir).forward({"input_ids": np.zeros((1, 1), dtype=np.int64)})
    with pytest.raises(BackendError, match="the runner is not active"):
        OpenVinoRunner(ir).prefill(np.zeros((1, 1), dtype=np.int64))


def test_a_device_it_does_not_run_on_is_refused(ir: ExportArtifact) -> None:
    with pytest.raises(ConfigError, match="on Intel's gpu and npu, not on 'cuda:0'; pass --device cpu"):
        OpenVinoExporter().open(ir, device="cuda:0")
    with pytest.raises(BackendError, match=r"OpenVINO finds no XPU7 here, only .*CPU.*; use --device cpu"):
        OpenVinoExporter().open(ir, device="xpu7").__enter__()


def test_an_ir_that_is_no_ir_is_refused(ir: ExportArtifact, tmp_path: Path) -> None:
    damaged = _copy(ir, tmp_path / "damaged")
    (damaged.path / "model.xml").write_text((ir.path / "model.xml").read_text()[:2000])
    with pytest.raises(BackendError, match=r"OpenVINO 20\S+ cannot load .*model.xml; .*; export it again"):
        OpenVinoExporter().open(damaged).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "fp16"}, "option of exporter 'openvino' .*precison.*precision"),
        ({"precision": "int4"}, "precision='int4' is not offered; an IR's weights are fp32 or fp16 here"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    exported: Lookup, options: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        OpenVinoExporter().export(exported("llama").models["pruned"], out, **options)
    assert not out.exists()


def test_weights_it_cannot_write_are_refused(out: Path) -> None:
    for dtype, options, message in (
        ("bf16", {}, "the weights are bfloat16"),
        ("fp16", {"precision": "fp32"}, "'fp32' was asked for a model whose weights are fp16; the file would hold tw"),
    ):
        loaded = tiny.loaded("llama", num_hidden_layers=2)
        module = loaded.module.to({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
        compressor = Compressor(LoadedModel(module, loaded.tokenizer, loaded.source))
        with pytest.raises(ConfigError, match=message):
            compressor.export(compressor.keep_all(), "openvino", out, **options)
        assert not out.exists()


def test_an_operator_openvino_does_not_know_is_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="their.own")
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("their.own", 1)]
    onnx.save(
        helper.make_model(helper.make_graph([node], "graph", [x], [y]), opset_imports=imports), tmp_path / "model.onnx"
    )
    with pytest.raises(BackendError, match=r"cannot convert the graph; .*operations: their\.own\.Frobnicate; export"):
        _convert(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that has no space left")
def test_a_disk_that_fills_up_leaves_nothing(exported: Lookup, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = openvino.save_model

    def on_a_full_disk(network: Any, file: Path, **options: Any) -> None:
        (file.parent / "model.bin").symlink_to("/dev/full")
        save(network, file, **options)

    monkeypatch.setattr(openvino, "save_model", on_a_full_disk)
    with pytest.raises(StorageError, match=r"cannot write .*model.bin; OpenVINO's file could not be completed; free"):
        _export(exported, "llama", out)
    assert list(out.parent.iterdir()) == []


def test_a_worker_that_runs_it_does_not_load_torch(ir: ExportArtifact) -> None:
    program = (
        "import sys\n"
        "from sglp_deploy import registry\n"
        "from sglp_deploy.artifact import ExportArtifact\n"
        f"artifact = ExportArtifact.load({str(ir.path)!r})\n"
        "with registry.exporter('openvino').open(artifact, threads=1) as runner:\n"
        "    import numpy\n"
        "    runner.prefill(numpy.zeros((1, 3), dtype=numpy.int64))\n"
        "print('torch' in sys.modules, 'onnx' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


# Whoever looks up a foreign name says so.
_LISTENING = (
    "import socket, sys\n"
    "def asked(*what, **more):\n"
    "    print('looked up', what[0])\n"
    "    raise OSError('no network')\n"
    "socket.getaddrinfo = asked\n"
    "from sglp_exporters.runners.openvino_alone import load_openvino\n"
    "openvino = load_openvino()\n"
    "openvino.Core().available_devices\n"
    "import openvino.tools.ovc.telemetry_utils as sender\n"
    "import time; time.sleep(1)\n"
    "print(sender.tm.__name__, 'openvino_telemetry' in sys.modules)\n"
)


@pytest.mark.parametrize(("track", "said"), [({}, "telemetry_stub False"), ({"DO_NOT_TRACK": "0"}, "_telemetry True")])
def test_openvino_reports_its_use_to_nobody(track: dict[str, str], said: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino_telemetry", reason="needs openvino_telemetry, which comes with openvino")
    # Continuous integration is one of the places in which the sender keeps still by itself.
    alone = {"HOME": str(tmp_path), **dict.fromkeys(("CI", "TF_BUILD", "JENKINS_URL"), "")}
    done = subprocess.run(
        [sys.executable, "-c", _LISTENING],
        env=environment(**alone, **track),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1].endswith(said)
    assert ("looked up" in done.stdout) == bool(track)
