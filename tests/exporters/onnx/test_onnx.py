from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import tiny
from exports import Exported, compressed
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError, ConfigError, StorageError
from sglp_deploy.materialize import materialize, save_checkpoint
from sglp_deploy.models import load_model
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import GeneratingRunner
from sglp_exporters.onnx import whole_model
from sglp_exporters.onnx.exporter import OnnxExporter, OnnxRuntimeRunner, _Traced

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")  # tied and untied, with bias, with a window
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_ARTIFACT = pytest.mark.parametrize("which", ["baseline", "pruned", "other"])
ATOL = 5e-5  # float32 rounding on logits of about 0.4

Lookup = Callable[[str], Exported]


def _ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows * 100 + length).integers(0, 256, (rows, length))


def _left_padded() -> tuple[np.ndarray, np.ndarray]:
    mask = (np.arange(20) >= np.array([[7], [0], [18]])).astype(np.int64)
    return _ids(3, 20) * mask, mask


@EVERY_FAMILY
@EVERY_ARTIFACT
@pytest.mark.parametrize("prompt", ["1", "7", "padded", "beyond"])
def test_an_artifact_computes_what_the_torch_model_computes(
    exported: Lookup, family: str, which: str, prompt: str
) -> None:
    one = exported(family)
    lengths = {"1": (1, 1), "7": (1, 7), "beyond": (2, 3 * tiny.WINDOW + 9)}
    ids, mask = _left_padded() if prompt == "padded" else (_ids(*lengths[prompt]), None)
    real = np.ones_like(ids, dtype=bool) if mask is None else mask == 1
    steps = _ids(len(ids), tiny.WINDOW + 5)
    with (
        OnnxExporter().open(one.artifacts[which], threads=1) as runner,
        TorchRunner(one.models[which].module) as reference,
    ):
        got = runner.prefill(ids, mask, all_positions=True)
        wanted = reference.prefill(ids, mask, all_positions=True)
        assert got.shape == wanted.shape == (*ids.shape, tiny.VOCAB_SIZE)
        np.testing.assert_allclose(got[real], wanted[real], atol=ATOL)
        np.testing.assert_allclose(runner.prefill(ids, mask), reference.prefill(ids, mask), atol=ATOL)
        for step in range(steps.shape[1]):
            got, wanted = runner.decode(steps[:, step]), reference.decode(steps[:, step])
            np.testing.assert_allclose(got, wanted, atol=ATOL, err_msg=f"step {step}")


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_the_prompts_above_would_notice_a_wrong_window(exported: Lookup, family: str) -> None:
    ids = _ids(2, 3 * tiny.WINDOW + 9)
    wider = tiny.model(family, sliding_window=64)
    with TorchRunner(exported(family).models["baseline"].module) as one, TorchRunner(wider) as other:
        difference = np.abs(one.prefill(ids, all_positions=True) - other.prefill(ids, all_positions=True)).max(axis=2)
    assert difference[:, : tiny.WINDOW].max() < 1e-5
    assert difference[:, -1].min() > 100 * ATOL


@EVERY_FAMILY
def test_every_depth_and_every_set_of_weights_comes_from_one_trace(exported: Lookup, family: str) -> None:
    one = exported(family)
    assert one.traces == 1
    assert len({artifact.derived_from for artifact in one.artifacts.values()}) == 1
    assert str(one.artifacts["pruned"].derived_from).startswith("trace:")


@pytest.mark.parametrize("keep", [(0, 1, 3), (2, 5), (6,)])
def test_a_pruned_model_that_lost_a_whole_kind_of_layer_needs_no_other_trace(
    exported: Lookup, keep: tuple[int, ...], out: Path
) -> None:
    OnnxExporter._template = exported("gemma3").template
    model = compressed("gemma3", keep)
    artifact = OnnxExporter().export(model, out)
    assert OnnxExporter._template is exported("gemma3").template
    ids = _ids(2, 30)
    with OnnxExporter().open(artifact) as runner, TorchRunner(model.module) as reference:
        np.testing.assert_allclose(runner.prefill(ids), reference.prefill(ids), atol=ATOL)
        np.testing.assert_allclose(runner.decode(ids[:, 0]), reference.decode(ids[:, 0]), atol=ATOL)


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [(1, (1, 1, 1)), (1, (40,)), (5, (2, 1, 30, 4)), (7, (1, 33))],  # traced with 2 rows, 3 tokens on a cache of 5
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_size_of_the_trace_is_burnt_into_the_graph(
    exported: Lookup, family: str, rows: int, pieces: tuple[int, ...]
) -> None:
    one, total = exported(family), sum(pieces)
    ids = _ids(rows, total)
    with TorchRunner(one.models["pruned"].module) as reference:
        wanted = reference.prefill(ids, all_positions=True)
    cache: dict[str, np.ndarray] = {}
    start = 0
    with OnnxExporter().open(one.artifacts["pruned"], threads=1) as runner:
        for length in pieces:
            end = start + length
            feed = {
                "input_ids": ids[:, start:end],
                "attention_mask": np.ones((rows, end), dtype=np.int64),
                "position_ids": np.arange(start, end)[None].repeat(rows, 0),
                "logits_to_keep": np.arange(length),
            }
            outputs = runner.forward(feed | cache)
            np.testing.assert_allclose(outputs["logits"], wanted[:, start:end], atol=ATOL, err_msg=f"{start} to {end}")
            cache = {n.replace("present", "past_key_values"): v for n, v in outputs.items() if n != "logits"}
            assert {value.shape[0] for value in cache.values()} == {rows}
            assert {value.shape[2] for value in cache.values()} == {end}
            start = end


@pytest.mark.parametrize("keep", [(4,), (0, 2, 5)])
def test_a_graph_of_repeated_layers_gives_the_very_bits_of_one_traced_whole(
    exported: Lookup, keep: tuple[int, ...], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed("gemma3", keep)
    OnnxExporter._template = exported("gemma3").template
    repeated = OnnxExporter().export(model, out)
    graph = whole_model.trace_whole_decoder(model.module)
    monkeypatch.setattr(
        OnnxExporter, "_trace", lambda *_: _Traced(graph, "decoder", "", "whole model", "asked for", "")
    )
    whole = OnnxExporter().export(model, out.parent / "whole")
    assert (repeated.details["traced"], whole.details["traced"]) == ("layer template", "whole model")
    ids, mask = _left_padded()
    logits = []
    for artifact in (repeated, whole):
        with OnnxExporter().open(artifact, threads=1) as runner:
            prompt = runner.prefill(ids, mask, all_positions=True)
            logits.append(np.concatenate([prompt, *(runner.decode(ids[:, k])[:, None] for k in range(12))], axis=1))
    assert np.array_equal(*logits)


# ------------------------------------------------------------------------------------------------------- interface


def test_without_logits_to_keep_only_the_last_position_is_computed(exported: Lookup) -> None:
    ids = _ids(2, 9)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None].repeat(2, 0)}
    with OnnxExporter().open(exported("llama").artifacts["pruned"]) as runner:
        last = runner.forward(feed)["logits"]
        every = runner.forward(feed | {"logits_to_keep": np.arange(9)})["logits"]
        some = runner.forward(feed | {"logits_to_keep": np.array([0, 5])})["logits"]
    assert last.shape == (2, 1, tiny.VOCAB_SIZE)
    np.testing.assert_allclose(last[:, 0], every[:, -1], atol=1e-6)
    np.testing.assert_allclose(some, every[:, [0, 5]], atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_may_be_given_in_pieces(exported: Lookup, family: str) -> None:
    ids = _ids(2, 25)
    with OnnxExporter().open(exported(family).artifacts["pruned"]) as runner:

        def run(start: int, end: int, cache: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            feed = {
                "input_ids": ids[:, start:end],
                "attention_mask": np.ones((2, end), dtype=np.int64),
                "position_ids": np.arange(start, end)[None].repeat(2, 0),
            }
            return runner.forward(feed | cache)

        whole = run(0, 25, {})
        piece = run(0, 11, {})
        cache = {n.replace("present", "past_key_values"): v for n, v in piece.items() if n != "logits"}
        np.testing.assert_allclose(run(11, 25, cache)["logits"], whole["logits"], atol=ATOL)


@EVERY_FAMILY
@EVERY_ARTIFACT
def test_the_manifest_says_what_is_in_the_folder(exported: Lookup, family: str, which: str) -> None:
    artifact, model = exported(family).artifacts[which], exported(family).models[which]
    assert sorted(artifact.files) == ["model.onnx", "model.onnx.data", "sglp_plan.json"]
    assert (artifact.format, artifact.precision, artifact.n_layers) == ("onnx", "fp32", model.n_layers)
    assert artifact.plan_digest == model.plan.digest()
    assert artifact.model == model.source.to_json()
    heads = model.module.config.num_key_value_heads
    caches = [
        (f"past_key_values.{n}.{part}", "float32", ("batch", heads, "past_sequence", 32))
        for n in range(model.n_layers)
        for part in ("key", "value")
    ]
    assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.inputs] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "total_sequence")),
        ("position_ids", "int64", ("batch", "sequence")),
        ("logits_to_keep", "int64", ("kept_logits",)),
        *caches,
    ]
    assert [spec.name for spec in artifact.outputs] == [
        "logits",
        *(name.replace("past_key_values", "present") for name, _, _ in caches),
    ]
    assert artifact.outputs[0].shape == ("batch", "kept_logits", tiny.VOCAB_SIZE)
    # Each weight once, a tied head not twice; the rest are a few constants.
    assert 0 <= artifact.weight_bytes - 4 * model.n_parameters < 4096
    assert artifact.total_bytes >= artifact.weight_bytes


@EVERY_FAMILY
def test_the_file_is_valid_onnx_that_keeps_nothing_it_does_not_use(exported: Lookup, family: str) -> None:
    for artifact in exported(family).artifacts.values():
        file = artifact.path / "model.onnx"
        onnx.checker.check_model(str(file), full_check=True)
        graph = ir.load(file).graph
        unused = [name for name, value in graph.initializers.items() if not value.uses()]
        assert unused == []
        assert not any(node.op_type == "Transpose" and node.inputs[0].is_initializer() for node in graph)
        text = file.read_bytes()
        for trace_of_this_machine in (b".py", b"/site-packages", b"/tmp/", str(Path.home()).encode() + b"/", b"File "):
            assert trace_of_this_machine not in text


def test_weights_lie_beside_the_graph_so_that_it_never_nears_two_gigabytes(exported: Lookup) -> None:
    # A protobuf ends at 2 GB; what stays in it must not grow with the weights.
    for artifact in exported("llama").artifacts.values():
        graph = onnx.load(str(artifact.path / "model.onnx"), load_external_data=False).graph
        inside = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
        assert max(tensor.ByteSize() for tensor in inside) < 1024
        assert sum(tensor.ByteSize() for tensor in inside) < 8192
        outside = sum(
            int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"
        )
        assert 0 <= artifact.weight_bytes - outside < 8192
        assert artifact.files["model.onnx.data"].bytes >= outside


def test_the_graph_grows_by_one_region_for_each_layer(exported: Lookup) -> None:
    def operators(which: str) -> dict[str, int]:
        kinds = [node.op_type for node in ir.load(exported("llama").artifacts[which].path / "model.onnx").graph]
        return {kind: kinds.count(kind) for kind in set(kinds)}

    baseline, pruned = operators("baseline"), operators("pruned")
    # Two of six layers went: every operator count falls by a multiple of 2 and none by anything else.
    assert {
        kind: count % 2 for kind, count in ((k, baseline[k] - pruned.get(k, 0)) for k in baseline)
    } == dict.fromkeys(baseline, 0)
    assert baseline["Softmax"] == 6
    assert pruned["Softmax"] == 4


def test_writing_a_checkpoint_in_between_does_not_cost_another_trace(exported: Lookup, out: Path) -> None:
    OnnxExporter._template = exported("llama").template
    model = compressed("llama", (0, 3))
    save_checkpoint(model, out.parent / "checkpoint")  # transformers notes the architecture in the configuration
    OnnxExporter().export(model, out)
    assert OnnxExporter._template is exported("llama").template


def test_the_same_model_gives_the_same_bytes(exported: Lookup, out: Path) -> None:
    OnnxExporter._template = exported("llama").template
    again = OnnxExporter().export(exported("llama").models["pruned"], out)
    assert again.digest == exported("llama").artifacts["pruned"].digest


def test_exporting_leaves_the_model_and_the_random_numbers_alone(exported: Lookup, out: Path) -> None:
    OnnxExporter._template = None  # so that it traces
    model = compressed("llama", (1, 4), num_hidden_layers=5)
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.module.state_dict().items()}
    config, generator = model.module.config.to_json_string(), torch.get_rng_state()
    OnnxExporter().export(model, out)
    for name, tensor in model.module.state_dict().items():
        assert tensor.data_ptr() == state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert model.module.config.to_json_string() == config
    assert torch.equal(torch.get_rng_state(), generator)
    # The template stays for the next export; the weights it was traced with do not.
    weight = weakref.ref(model.module.model.embed_tokens.weight)
    layer = weakref.ref(model.module.model.layers[0].mlp.up_proj.weight)
    assert OnnxExporter._template is not None
    del model, state, tensor
    gc.collect()
    assert weight() is None
    assert layer() is None


def test_half_precision_is_exported_as_it_is_and_says_nothing(
    tmp_path: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(tiny.save_tiny(tmp_path / "in", num_hidden_layers=2), dtype="fp16")
    model = materialize(loaded.module, tiny.plan_for(loaded.module, (1,)), tiny.source(loaded.module))
    artifact = OnnxExporter().export(model, out)
    assert capfd.readouterr() == ("", "")
    assert artifact.precision == "fp16"
    assert {spec.dtype for spec in artifact.outputs} == {"float16"}
    ids = _ids(2, 9)
    with OnnxExporter().open(artifact) as runner, TorchRunner(model.module) as reference:
        for got, wanted in (
            (runner.prefill(ids), reference.prefill(ids)),
            (runner.decode(ids[:, 0]), reference.decode(ids[:, 0])),
        ):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, atol=5e-3)


# ------------------------------------------------------------------------------------------------------- bad input


def test_bfloat16_is_refused_before_anything_is_traced(tmp_path: Path, out: Path) -> None:
    loaded = load_model(tiny.save_tiny(tmp_path / "in", num_hidden_layers=2), dtype="bf16")
    model = materialize(loaded.module, tiny.plan_for(loaded.module, (1,)), tiny.source(loaded.module))
    with pytest.raises(
        ConfigError, match=r"the weights are bfloat16; .*load the model with --dtype fp32 or --dtype fp16"
    ):
        OnnxExporter().export(model, out)


def test_an_unknown_option_is_refused(exported: Lookup, out: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option of exporter 'onnx' 'quantize'; .*one of attention, block_size"
    ):
        OnnxExporter().export(exported("llama").models["pruned"], out, quantize=True, opset=21)
    with pytest.raises(ConfigError, match=r"did you mean 'threads'"):
        OnnxExporter().open(exported("llama").artifacts["pruned"], thread=1)


def test_a_model_that_cannot_be_traced_says_why(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import exporters

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise NotImplementedError("aten::strange\nmany lines")

    monkeypatch.setattr(exporters.OnnxExporter, "export", fail)
    monkeypatch.setattr(OnnxExporter, "_template", None)
    with pytest.raises(BackendError) as caught:
        OnnxExporter().export(compressed("llama"), out)
    assert str(caught.value) == (
        "the model cannot be traced to ONNX; NotImplementedError: aten::strange; run again with -v for the whole trace"
    )
    assert isinstance(caught.value.__cause__, NotImplementedError)


def test_a_full_disk_leaves_nothing_new_and_the_old_artifact_whole(
    exported: Lookup, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxExporter._template = exported("llama").template
    shutil.copytree(exported("llama").artifacts["pruned"].path, out)
    save = ir.save

    def half(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", half)
    for target in (out, out.parent / "new"):
        with pytest.raises(StorageError, match=rf"cannot write {target}; no space left on the device; free some space"):
            OnnxExporter().export(exported("llama").models["baseline"], target)
    assert [path.name for path in out.parent.iterdir()] == ["artifact"]
    assert ExportArtifact.load(out).n_layers == 4


def test_a_graph_that_is_not_valid_is_never_delivered(
    exported: Lookup, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OnnxExporter._template = exported("llama").template

    def refuse(_file: str, full_check: bool) -> None:
        raise onnx.checker.ValidationError("Nodes in a graph must be topologically sorted\nContext: ...")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(BackendError, match=r"the assembled graph is not valid ONNX; Nodes in a graph must be topolog"):
        OnnxExporter().export(exported("llama").models["pruned"], out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "sglp_plan.json"])
def test_one_altered_byte_is_noticed(exported: Lookup, out: Path, name: str) -> None:
    shutil.copytree(exported("llama").artifacts["pruned"].path, out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name} differs from its digest in the manifest; the file was altered"):
        ExportArtifact.load(out)


def test_a_graph_onnx_runtime_refuses_is_named(exported: Lookup, out: Path) -> None:
    shutil.copytree(exported("llama").artifacts["pruned"].path, out)
    artifact = ExportArtifact.load(out)
    (out / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .*model\.onnx; .*; export it again"):
        OnnxExporter().open(artifact).__enter__()


def test_a_device_that_is_not_there_is_refused(exported: Lookup) -> None:
    artifact = exported("llama").artifacts["pruned"]
    with pytest.raises(ConfigError, match=r"runs on cpu or cuda here, not 'tpu'; pass --device cpu or cuda"):
        OnnxExporter().open(artifact, device="tpu")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has what the error is about")
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider, only .*; .*or use --device cpu"):
        OnnxExporter().open(artifact, device="cuda").__enter__()


@pytest.mark.parametrize("left", [["CPUExecutionProvider"], ["CPUExecutionProvider", "CUDAExecutionProvider"], []])
def test_a_runtime_that_falls_back_to_another_device_is_caught_by_name(
    exported: Lookup, monkeypatch: pytest.MonkeyPatch, left: list[str]
) -> None:
    import onnxruntime

    preloaded: list[str] = []

    class FellBack:
        def __init__(self, _file: str, _options: Any, providers: list[Any]) -> None:
            assert preloaded == [""]  # CUDA's libraries in pip's folders, which a process without torch does not find
            assert [name for name, _ in providers] == ["CUDAExecutionProvider"]

        def get_providers(self) -> list[str]:
            return left

    # As onnxruntime-gpu does it without CUDA's libraries: it is listed, and dropped with a warning when it is loaded.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *left])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory: preloaded.append(directory))
    runner = OnnxExporter().open(exported("llama").artifacts["pruned"], device="cuda")
    with pytest.raises(
        BackendError, match=r"fell back from CUDAExecutionProvider to \[.*\]; a number taken there would be"
    ):
        runner.__enter__()


def test_a_runner_is_used_inside_with_and_prefilled_before_it_decodes(exported: Lookup) -> None:
    runner = OnnxExporter().open(exported("llama").artifacts["pruned"])
    assert isinstance(runner, GeneratingRunner)
    with pytest.raises(BackendError, match=r"the runner is not active; .*use it as a context manager"):
        runner.prefill(_ids(1, 3))
    with runner:
        with pytest.raises(BackendError, match=r"decode was called before prefill; .*call prefill first"):
            runner.decode(np.array([1]))
        runner.prefill(_ids(1, 3))
        runner.synchronize()
    with runner, pytest.raises(BackendError, match=r"call prefill first"):
        runner.decode(np.array([1]))


def test_wrong_inputs_are_explained(exported: Lookup) -> None:
    ids = _ids(1, 3)
    with OnnxExporter().open(exported("llama").artifacts["pruned"]) as runner:
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on .*; .*; check the inputs' names, shapes"):
            runner.forward({"input_ids": ids})
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on .*; check the inputs' names, shapes and types"):
            runner.prefill(np.array([[tiny.VOCAB_SIZE + 5]]))


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_cpu(exported: Lookup) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    artifact, ids = exported("gemma3").artifacts["pruned"], _ids(2, 20)
    logits = []
    for device in ("cpu", "cuda"):
        with OnnxRuntimeRunner(artifact, device) as runner:
            logits.append(np.stack([runner.prefill(ids), *(runner.decode(ids[:, k]) for k in range(9))]))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-3)


def test_running_an_artifact_needs_no_torch(exported: Any) -> None:
    # A benchmark's worker measures its own memory; torch in it would be counted as the artifact's.
    folder = exported("llama").artifacts["pruned"].path
    code = (
        "import sys, numpy as np\n"
        "from sglp_deploy import registry\n"
        "from sglp_deploy.artifact import ExportArtifact\n"
        f"artifact = ExportArtifact.load({str(folder)!r})\n"
        "with registry.exporter('onnx').open(artifact) as runner:\n"
        "    runner.prefill(np.array([[1, 2, 3]]))\n"
        "    runner.decode(np.array([4]))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
