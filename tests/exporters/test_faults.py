"""Four faults in every format, each caught by name: a wrong weight, a wrong type, a wrong cache, a silent fallback.

A format joins by one entry of ``FORMATS``; ``None`` says that a fault has no place in it, and why.  Files are changed
and the manifest is then made to fit them, so that only what is in them can tell.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import mutations
import tiny
from exports import Exported, share_traces
from sglp_bench.measure.worker import run_block
from sglp_bench.workloads.generate import Workload
from sglp_deploy import CalibrationSet, Compressor, registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import BackendError, SGLPError
from sglp_deploy.parity.certificate import ParityReport
from sglp_exporters.runners import stored_weights
from short_certificates import fewer_steps

KEEP = tiny.KEEP["llama"]
MATRIX = "model.layers.2.mlp.up_proj"  # of the pruned model
Change = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Format:
    """One format and how each fault is planted in it.

    Attributes:
        name: Exporter.
        needs: Module that must be importable.
        change: Folder, piece of a weight's name and a function: changes every weight whose name has that piece.
        exchange: Exchanges the caches of layers 1 and 2 in the files, or says why there is nothing to exchange.
        exchanged: What is said then.
        half: Options that give float16 weights ("dtype" is the model's own), whose manifest is then made to say fp32,
            or why there are none.
        halved: What is said then.
        fallback: Makes the runtime go elsewhere than it was told; opens the runner and raises what is said.
        fell_back: What is said then.
        caches: Whether the runner hands its cache out, so that the layer is named.
    """

    name: str
    needs: str
    change: Callable[[Path, str, Change], None]
    exchange: Callable[[Path], None] | str
    exchanged: str
    fallback: Callable[[ExportArtifact, pytest.MonkeyPatch], None] | str
    fell_back: str
    halved: str = r"wrong dtype: \d+% of the weights are stored as float16, .* and the manifest says fp32"
    half: Mapping[str, Any] | str = field(default_factory=dict)
    caches: bool = True


# ------------------------------------------------------------------------------------------- weights, where they lie


def _in_checkpoint(folder: Path, piece: str, change: Change) -> None:
    import torch

    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if piece in name]:
        weights[name] = torch.from_numpy(np.ascontiguousarray(change(weights[name].numpy())))
    save_file(weights, file, metadata={"format": "pt"})


def _in_onnx(folder: Path, piece: str, change: Change) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for tensor in graph.initializer:
        if piece not in tensor.name or tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < 2:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if not facts:
            continue  # tables in the graph itself
        value = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
        with (folder / facts["location"]).open("r+b") as stream:
            stream.seek(int(facts.get("offset", 0)))
            stream.write(np.ascontiguousarray(change(value), dtype=np.float32).tobytes())


def _in_openvino(folder: Path, piece: str, change: Change) -> None:
    """The constants lie in ``model.bin`` as the IR says; found there by their bytes."""
    artifact = ExportArtifact.load(folder, check_files=False)
    data = bytearray((folder / "model.bin").read_bytes())
    for tensor in stored_weights.of_openvino(artifact):
        if piece in tensor.name and tensor.dtype == "float32" and tensor.elements > 1:
            right = np.ascontiguousarray(tensor.read(), dtype=np.float32)
            place = data.find(right.tobytes())
            assert place >= 0, tensor.name
            data[place : place + right.nbytes] = np.ascontiguousarray(change(right), dtype=np.float32).tobytes()
    (folder / "model.bin").write_bytes(data)


def _one_value(value: NDArray[Any]) -> NDArray[Any]:
    """The largest value times 16: four in its exponent, a single bit."""
    changed = np.array(value)
    changed.flat[int(np.abs(value).argmax())] *= 16
    return changed


def _zeros(value: NDArray[Any]) -> NDArray[Any]:
    return np.zeros_like(value)


def _through_half(value: NDArray[Any]) -> NDArray[Any]:
    return value.astype(np.float16).astype(value.dtype)


# ------------------------------------------------------------------------------------------- caches, where they lie


def _exchange_in_onnx(folder: Path) -> None:
    """The graph's outputs of layers 1 and 2 trade names; its inputs stay, so only what is generated is wrong."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    trade = {}
    for part in ("key", "value"):
        trade |= {f"present.1.{part}": f"present.2.{part}", f"present.2.{part}": f"present.1.{part}"}
    assert set(trade) <= {value.name for value in model.graph.output}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [trade.get(name, name) for name in names]
    onnx.save(model, folder / "model.onnx")


def _exchange_in_openvino(folder: Path) -> None:
    """As above, in the names the IR gives the results."""
    text = (folder / "model.xml").read_text()
    for part in ("key", "value"):
        one, two = f"present.1.{part}", f"present.2.{part}"
        assert one in text
        text = text.replace(one, "@@").replace(two, one).replace("@@", two)
    (folder / "model.xml").write_text(text)


# ----------------------------------------------------------------------------------------------------- falling back


def _open(artifact: ExportArtifact, device: str = "cpu") -> None:
    with registry.exporter(artifact.format).open(artifact, device=device, threads=1):
        pass


def _no_such_device(artifact: ExportArtifact, _patch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: here the device is really there")
    _open(artifact, "cuda")


def _onnx_drops_cuda(artifact: ExportArtifact, patch: pytest.MonkeyPatch) -> None:
    """As its GPU build does where the CUDA libraries do not load: it lists the provider, and takes the CPU."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    cpu = ["CPUExecutionProvider"]
    patch.setattr(onnxruntime, "InferenceSession", lambda file, settings, **_: real(file, settings, providers=cpu))
    patch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    _open(artifact, "cuda")


def _openvino_goes_elsewhere(artifact: ExportArtifact, patch: pytest.MonkeyPatch) -> None:
    """Its AUTO plugin, in the place of the device that was asked for: it reports what it chose."""
    import openvino

    real = openvino.Core.compile_model

    class Elsewhere:
        def __init__(self, made: Any) -> None:
            self._made = made

        def get_property(self, name: str) -> Any:
            return ["GPU.0"] if name == "EXECUTION_DEVICES" else self._made.get_property(name)

    patch.setattr(openvino.Core, "compile_model", lambda *given: Elsewhere(real(*given)))
    _open(artifact)


def _vllm_is_not_there(artifact: ExportArtifact, _patch: pytest.MonkeyPatch) -> None:
    """Without its environment transformers reads the folder: good for a certificate that says so, not for a time."""
    workload = Workload.named("smoke", device="cpu", threads=1)
    spec = {"artifact": str(artifact.path), "artifact_digest": artifact.digest, "opener": None, "mode": "time"}
    run_block({**spec, "workload": workload.to_json(), "vocab_size": tiny.VOCAB_SIZE})


def _genai_folder_names_cuda(artifact: ExportArtifact, _patch: pytest.MonkeyPatch) -> None:
    file = artifact.path / "genai_config.json"
    settings = json.loads(file.read_text())
    settings["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    file.write_text(json.dumps(settings))
    _open(artifact)


def _genai_goes_elsewhere(artifact: ExportArtifact, patch: pytest.MonkeyPatch) -> None:
    import onnxruntime_genai as og

    real = og.Model

    class Elsewhere:
        device_type = "DML"

        def __init__(self, config: Any) -> None:
            self.made = real(config)

    patch.setattr(og, "Model", Elsewhere)
    _open(artifact)


_OWN_CACHE = "the library that reads a checkpoint makes the cache; there is none in the files"
_KEPT_AS = r"cache of the wrong layer: present\.1\.key holds what the model keeps as present\.2\.key"
_HALF = {"dtype": "fp16"}
_HALF_CACHE = r"cache tensor past_key_values\.0\.key is float16 of shape .*, its torch model keeps float32"

FORMATS = {
    made.name: made
    for made in (
        Format(
            "torch", "torch", _in_checkpoint, _OWN_CACHE, "", _no_such_device,
            r"transformers cannot load .* on cuda; .*; check the device", half=_HALF, caches=False,
        ),
        Format(
            "vllm", "torch", _in_checkpoint, _OWN_CACHE, "",
            _vllm_is_not_there, r"what runs on cpu is transformers in place of vLLM: .* would be filed under vllm",
            half=_HALF, caches=False,
        ),
        Format(
            "onnx", "onnxruntime", _in_onnx, _exchange_in_onnx, _KEPT_AS, _onnx_drops_cuda,
            r"fell back from CUDAExecutionProvider to \['CPUExecutionProvider'\]; .* mislabelled",
            _HALF_CACHE, half=_HALF,
        ),
        Format(
            "openvino", "openvino", _in_openvino, _exchange_in_openvino, _KEPT_AS, _openvino_goes_elsewhere,
            r"OpenVINO went to GPU\.0 although CPU was asked for; .* mislabelled", half={"precision": "fp16"},
        ),
        Format(
            "ort-genai", "onnxruntime_genai", _in_onnx, _exchange_in_onnx, _KEPT_AS, _genai_goes_elsewhere,
            r"ONNX Runtime GenAI went to DML although cpu was asked for; .* mislabelled",
            half="its exporter writes no float16 weights",
        ),
        # An engine's stand-in and its folder are those of a kit, which needs no TensorRT to be made.
        Format(
            "tensorrt-kit", "onnxruntime", _in_onnx, _exchange_in_onnx,
            r"the ONNX in .* is not the one TensorRT was given", _no_such_device,
            r"there is no engine in .*built; a kit is built on its target",
            half="its graph is the onnx exporter's, whose float16 is planted there",
        ),
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the bench


class Made:
    """The compressor and one right artifact of each format, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compressor = Compressor(tiny.loaded("llama"))
        self.plan = self.compressor.plan_by_hand([i for i in range(6) if i not in KEEP])
        self._right: dict[str, Path] = {}

    def copy(self, kind: Format, folder: Path) -> Path:
        if kind.name not in self._right:
            self._right[kind.name] = self.compressor.export(self.plan, kind.name, self.folder / kind.name).path
        return Path(shutil.copytree(self._right[kind.name], folder / kind.name))

    def certify(self, folder: Path) -> ParityReport:
        text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
        return self.compressor.verify(ExportArtifact.load(folder), text=text, threads=1)


@pytest.fixture(scope="module")
def made(exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        fewer_steps(patch)
        exported("llama")  # the trace the whole session shares
        share_traces(patch)
        yield Made(tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module", params=FORMATS.values(), ids=FORMATS)
def kind(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    if importlib.util.find_spec(found.needs) is None:
        pytest.skip(f"needs {found.needs}, which runs or builds {found.name}")
    return found


def _said(made: Made, folder: Path) -> str:
    """Everything a user is told: the error, or every reason on the certificate."""
    mutations.fix_digests(folder)
    try:
        report = made.certify(folder)
    except SGLPError as error:
        return str(error)
    assert not report.passed, "nothing was said"
    return "\n".join(report.reasons)


# ---------------------------------------------------------------------------------------------------------- the tests


def test_a_right_artifact_is_accused_of_nothing(made: Made, kind: Format, tmp_path: Path) -> None:
    report = made.certify(made.copy(kind, tmp_path))
    assert report.passed
    assert report.reasons == ()


@pytest.mark.parametrize("damage", [_one_value, _zeros])
def test_a_corrupted_weight_is_named_with_its_layer(made: Made, kind: Format, damage: Change, tmp_path: Path) -> None:
    folder = made.copy(kind, tmp_path)
    kind.change(folder, MATRIX, damage)
    said = _said(made, folder)
    assert mutations.NUMBERS.search(said)
    count = "1 of 6144" if damage is _one_value else r"61\d\d of 6144"
    assert re.search(
        rf"the stored weight {re.escape(MATRIX)}\S*( \(the model's \S+\))? differs in {count} values", said
    )
    if kind.caches:  # layer 3 is the first whose input has gone through the damage
        assert "the cache present.3.key differs" in said
        assert "the caches of the layers before it agree, so the fault lies in layer 2" in said


def test_weights_that_hold_the_values_of_another_layer_are_named(made: Made, kind: Format, tmp_path: Path) -> None:
    folder = made.copy(kind, tmp_path)
    seen: list[NDArray[Any]] = []
    kind.change(folder, "model.layers.1.mlp.up_proj", lambda value: seen.append(np.array(value)) or value)
    kind.change(folder, MATRIX, lambda _value: seen[0])
    words = (
        rf"the stored weight {re.escape(MATRIX)}\S* is not the model's: it holds the values of model\.layers\.1\.mlp"
    )
    assert re.search(words, _said(made, folder))


def test_weights_rounded_to_float16_are_named_so(made: Made, kind: Format, tmp_path: Path) -> None:
    folder = made.copy(kind, tmp_path)
    kind.change(folder, "", _through_half)
    assert re.search(r"wrong dtype: the stored weight \S+ holds \S+ rounded to float16", _said(made, folder))


def test_float16_weights_under_a_manifest_that_says_float32_are_named_so(
    made: Made, kind: Format, tmp_path: Path
) -> None:
    if isinstance(kind.half, str):
        pytest.skip(kind.half)
    options = dict(kind.half)
    compressor, plan = made.compressor, made.plan
    if options.pop("dtype", None):
        folder = tiny.save_tiny(tmp_path / "model")
        compressor = Compressor.from_pretrained(folder, dtype="fp16")
        plan = compressor.plan_by_hand([i for i in range(6) if i not in KEEP])
    artifact = compressor.export(plan, kind.name, tmp_path / "half", **options)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    manifest["precision"] = "fp32"
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    assert re.search(kind.halved, str(_judge(compressor, artifact.path)))


def _judge(compressor: Compressor, folder: Path) -> str:
    try:
        text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
        return "\n".join(compressor.verify(ExportArtifact.load(folder), text=text, threads=1).reasons)
    except SGLPError as error:
        return str(error)


def test_a_precision_nobody_used_is_named_because_it_would_loosen_the_bounds(
    made: Made, kind: Format, tmp_path: Path
) -> None:
    folder = made.copy(kind, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["precision"] = "int8"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "wrong dtype: the weights are stored as float32, and the manifest says int8" in _said(made, folder)


def test_exchanged_caches_are_named(made: Made, kind: Format, tmp_path: Path) -> None:
    if isinstance(kind.exchange, str):
        pytest.skip(kind.exchange)
    folder = made.copy(kind, tmp_path)
    kind.exchange(folder)
    assert re.search(kind.exchanged, _said(made, folder))


def test_a_runtime_that_goes_elsewhere_is_named(
    made: Made, kind: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(kind.fallback, str):
        pytest.skip(kind.fallback)
    artifact = ExportArtifact.load(made.copy(kind, tmp_path))
    with pytest.raises(SGLPError, match=kind.fell_back):
        kind.fallback(artifact, monkeypatch)


def test_a_genai_folder_that_names_another_provider_does_not_load(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (pip install 'sglp-deploy[genai]')")
    artifact = ExportArtifact.load(made.copy(FORMATS["ort-genai"], tmp_path))
    with pytest.raises(BackendError, match=r"cannot load .*; Cuda interface not available"):
        _genai_folder_names_cuda(artifact, pytest.MonkeyPatch())


def test_every_format_that_can_be_opened_is_here_or_has_tests_of_its_own() -> None:
    elsewhere = {
        "tensorrt": "the same files and the same stand-in as tensorrt-kit; its own device: test_tensorrt_runner.py",
        "executorch": "test_executorch.py",
        "gguf": "test_gguf.py",
        "optimum": "test_optimum.py",
    }
    built_in = set(registry.BUILTIN)
    assert built_in <= set(FORMATS) | set(elsewhere)
