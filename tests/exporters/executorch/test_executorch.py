"""ExecuTorch without its runtime: the trace computes what the model does, what is refused, the runner's protocol."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import zoo
from exports import compressed
from sglp_deploy import registry
from sglp_deploy.artifact import ExportArtifact, TensorSpec
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    MissingDependencyError,
    UnsupportedModelError,
)
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import Exporter, GeneratingRunner, Runner
from sglp_exporters.executorch import runner as executorch_runner
from sglp_exporters.executorch import tracing
from sglp_exporters.executorch.exporter import (
    ExecuTorchExporter,
    ExecuTorchForwardRunner,
    ExecuTorchRunner,
    check_delegation,
)
from sglp_exporters.executorch.runner import check_program

VARIABLE = environments.variable("executorch")


def _specimen(name: str) -> Compressor:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))


def _traced(module: nn.Module, folder: Path, length: int = 200) -> nn.Module:
    """The program as the worker would find it: written, and read back."""
    program, _ = tracing.trace_decoder(module, length)  # type: ignore[arg-type]  # any module with a decoder's forward will do
    torch.export.save(program, folder / "traced.pt2")
    return torch.export.load(folder / "traced.pt2").module()


# ---------------------------------------------------------------------------------------------- the trace


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_traced_decoder_continues_its_cache_as_the_model_does(family: str, tmp_path: Path) -> None:
    """Twenty tokens at once and five more one pair at a time, beyond Gemma-3's window of 8."""
    module: Any = compressed(family, tiny.KEEP[family]).module
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB_SIZE, (1, 26))
    with TorchRunner(module) as reference:
        wanted = reference.prefill(ids, all_positions=True)
    program = _traced(module, tmp_path)
    found = []
    for start, end in ((0, 20), (20, 22), (22, 24), (24, 26)):
        positions = torch.arange(start, end)
        with torch.no_grad():
            found.append(program(torch.from_numpy(ids[:, start:end]), positions, torch.arange(end - start)).numpy())
    np.testing.assert_allclose(np.concatenate(found, axis=1), wanted, atol=1e-5)


def test_a_prompt_at_position_0_forgets_the_sequence_before_it(tmp_path: Path) -> None:
    program = _traced(compressed("llama", (0, 5)).module, tmp_path)
    first, second = torch.arange(10, 40)[None], torch.arange(50, 70)[None]

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = program(ids, torch.arange(ids.shape[1]), torch.tensor([0, -1]))
        return logits

    fresh = run(second)
    run(first)
    assert torch.equal(run(second), fresh)


def test_tracing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    module: Any = tiny.model("llama")
    file = sys.modules[type(module).__module__]
    before = (module.config._attn_implementation, file.rotate_half, sorted(name for name, _ in module.named_buffers()))
    _traced(module, tmp_path)
    after = (module.config._attn_implementation, file.rotate_half, sorted(name for name, _ in module.named_buffers()))
    assert after == before


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_traced_forward_pass_gives_the_model_s_output(name: str) -> None:
    module = _specimen(name).materialize(_specimen(name).plan_by_hand([1, 3])).module
    program, inputs, output = tracing.trace_forward(module, 100)
    with torch.no_grad():
        found, wanted = program.module()(*inputs.values()), module(**inputs)
    assert output == "logits"
    np.testing.assert_allclose(found.numpy(), wanted.logits.numpy(), atol=1e-5)


def test_attention_within_the_windows_of_an_image_is_traced_as_it_stands() -> None:
    """Windows are rows of a batch there, which the common form for one sequence has no place for."""
    specimen = next(each for each in zoo.specimens() if each.name == "swin")
    module = specimen.build().eval()
    program, inputs, _ = tracing.trace_forward(module, 100)
    with torch.no_grad():
        found, wanted = program.module()(*inputs.values()), module(**inputs).logits
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-5)


def _operators(module: Any) -> set[str]:
    program, _ = tracing.trace_decoder(module, 200)
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_means_and_rotations_are_products_with_constants() -> None:
    """XNNPACK takes neither a mean over the last axis nor slices of a varying number of rows."""
    names = _operators(compressed("llama", (0, 5)).module)
    assert {"aten.linear.default", "aten.bmm.default"} <= names
    assert not {"aten.mean.dim", "aten.repeat_interleave.self_int", "aten.neg.default"} & names


def test_a_gelu_by_tanh_is_spelt_out() -> None:
    """ExecuTorch 1.5.1 lowers every GELU to XNNPACK's exact one, which Gemma's is not."""
    module: Any = compressed("gemma3", (0, 5)).module
    assert module.config.hidden_activation == "gelu_pytorch_tanh"
    names = _operators(module)
    assert "aten.tanh.default" in names
    assert "aten.gelu.default" not in names


class _BurntIn(nn.Module):
    """Loops over the tokens in Python, which tracing unrolls."""

    main_input_name = "input_ids"
    config = tiny.config("llama")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny.VOCAB_SIZE, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.table(input_ids) * attention_mask[..., None]
        return torch.stack([found[:, at] for at in range(input_ids.shape[1])])


def test_a_size_that_tracing_burnt_in_is_refused() -> None:
    with pytest.raises(BackendError, match=r"tracing burnt the size 24 of axis 1 of .* into the program; .*; export"):
        tracing.trace_forward(_BurntIn(), 100)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(executorch_runner, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_runtime")
def test_without_the_runtime_the_export_says_how_to_get_it_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="run 'sglp-deploy env create executorch'"):
        ExecuTorchExporter().export(compressed("llama"), tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_runtime")
def test_without_the_runtime_an_artifact_opens_and_does_not_start(tmp_path: Path) -> None:
    runner = ExecuTorchExporter().open(_artifact(tmp_path))
    with pytest.raises(MissingDependencyError, match="run 'sglp-deploy env create executorch'"):
        runner.__enter__()


def test_a_folder_called_executorch_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_runner, "find_spec", lambda name: None)
    assert not executorch_runner._have_executorch()
    monkeypatch.undo()
    if executorch_runner._have_executorch():
        pytest.skip("needs an interpreter without executorch")
    (tmp_path / "executorch").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_spec("executorch") is not None
    assert not executorch_runner._have_executorch()


def test_an_interpreter_of_ours_that_has_executorch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(executorch_runner, "find_spec", lambda name: name == "executorch.runtime" or None)
    assert executorch_runner.python() == Path(sys.executable)
    monkeypatch.setenv(VARIABLE, "/bin/sh")  # a user who names one means it
    assert executorch_runner.python() == Path("/bin/sh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 5}, "did you mean 'max_tokens'"),
        ({"precision": "int8"}, "precision='int8' is not offered; programs are certified in fp32 only; leave it out"),
        ({"max_tokens": 100}, "max_tokens=100 cannot be used; the model has 256 positions, .* from 192 to 256"),
        ({"max_tokens": 300}, "max_tokens=300 cannot be used; the model has 256 positions, .* from 192 to 256"),
        ({"max_tokens": True}, "max_tokens=True cannot be used"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ExecuTorchExporter().export(compressed("llama"), tmp_path / "artifact", **options)


def test_a_model_without_tokens_takes_no_max_tokens(tmp_path: Path) -> None:
    compressor = _specimen("vit")
    with pytest.raises(ConfigError, match="max_tokens=300 was given for ViTForImageClassification, which takes no"):
        compressor.export(compressor.keep_all(), "executorch", tmp_path / "artifact", max_tokens=300)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_refused_before_any_work(precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"the weights are {precision}; .*; load the model with --dtype fp32"):
        ExecuTorchExporter().check_precision(precision)


def test_a_device_other_than_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"XNNPACK, which runs on the cpu and not on 'cuda'; .*; pass --device cpu"):
        ExecuTorchExporter().open(_artifact(tmp_path), device="cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lfm2", "no cache that a program could hold in buffers of fixed size; .* other state than keys and values"),
        ("t5", "is an encoder-decoder; a program for one sequence has no place for two"),
        ("hubert", "takes input_values; this exporter takes images and text only"),
    ],
)
def test_a_model_a_program_cannot_hold_is_refused_with_the_reason(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, sys.executable)  # never started
    compressor = _specimen(name)
    with pytest.raises(UnsupportedModelError, match=message):
        compressor.export(compressor.keep_all(), "executorch", tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_program_xnnpack_takes_nothing_of_is_a_silent_fallback() -> None:
    with pytest.raises(
        BackendError,
        match=r"silent fallback: XNNPACK took 0 of this model's 14 .*; 12 addmm, 2 bmm would run in",
    ):
        check_delegation({"delegated": {}, "portable": {"addmm": 12, "bmm": 2, "add": 40}})


def test_a_program_xnnpack_takes_the_lesser_part_of_is_a_silent_fallback() -> None:
    with pytest.raises(BackendError, match=r"silent fallback: XNNPACK took 3 of this model's 8 .*; 5 convolution"):
        check_delegation({"delegated": {"linear": 3, "mul": 90}, "portable": {"convolution": 5}})


def test_a_program_xnnpack_takes_nearly_all_of_passes() -> None:
    check_delegation({"delegated": {"linear": 3, "mul": 90}, "portable": {"embedding": 1, "bmm": 1}})


# ---------------------------------------------------------------------------------------------- the runner's protocol

_FAKE = """
import os, sys
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])
import numpy as np
from worker_loop import serve

state = {}

def start(file, threads):
    state["threads"] = threads
    tensor = {"sizes": [1, 9], "scalar_type": 4}
    state["shared"] = np.memmap("logits.bin", dtype=np.float32, mode="w+", shape=(6,))
    return {"shared": os.path.abspath("logits.bin"), "versions": {"executorch": "0"}, "threads": threads or 4,
            "backends": FAKE_BACKENDS, "inputs": [tensor], "outputs": [], "cache": []}

def one(tokens, start):  # a distribution that says which tokens it has seen, and from where
    return np.array([[sum(tokens[: at + 1]), start + at, len(tokens)] for at in range(len(tokens))], dtype=np.float32)

def prefill(rows, every_position):
    state["rows"] = [len(row) for row in rows]
    return answer([one(row, 0)[slice(None) if every_position else slice(-1, None)] for row in rows])

def answer(found):  # at most two positions have room in the shared memory
    logits = np.concatenate(found)
    if logits.size > 6:
        return {"logits": logits}
    state["shared"][: logits.size] = logits.reshape(-1)
    return {"shape": list(logits.shape)}

def decode(tokens):
    found = [one([token], at) for token, at in zip(tokens, state["rows"], strict=True)]
    state["rows"] = [at + 1 for at in state["rows"]]
    return answer(found)

def forward(names, **inputs):
    return {"output": sum(inputs[name].sum(1, keepdims=True) * 10 ** at for at, name in enumerate(names))}

serve({"start": start, "prefill": prefill, "decode": decode, "forward": forward})
"""
_PROGRAM = {"inputs": ["int64 [1, 9]"], "outputs": [], "cache": []}


def _artifact(folder: Path, **details: Any) -> ExportArtifact:
    facts: dict[str, Any] = {"interface": "decoder", "max_tokens": 9, "program": _PROGRAM} | details
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    return ExportArtifact(
        path=folder,
        format="executorch",
        files={},
        inputs=inputs if facts["interface"] == "forward" else (),
        outputs=(TensorSpec("logits", "float32", ("batch", 3)),) if facts["interface"] == "forward" else (),
        precision="fp32",
        weight_bytes=0,
        n_layers=1,
        plan_digest="",
        model={},
        details=facts,
    )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(_FAKE.replace("FAKE_BACKENDS", '["XnnpackBackend"]'))
    monkeypatch.setattr(executorch_runner, "WORKER", script)
    monkeypatch.setenv(VARIABLE, sys.executable)
    return script


def test_the_exporter_and_its_runners_are_what_the_protocols_ask_for(tmp_path: Path) -> None:
    exporter = registry.exporter("executorch")
    assert isinstance(exporter, Exporter)
    assert isinstance(exporter.open(_artifact(tmp_path)), GeneratingRunner)
    single = exporter.open(_artifact(tmp_path, interface="forward"))
    assert isinstance(single, Runner)
    assert not isinstance(single, GeneratingRunner)


@pytest.mark.usefixtures("fake")
def test_rows_reach_the_program_without_their_padding(tmp_path: Path) -> None:
    ids, mask = np.array([[0, 0, 5, 6], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    with ExecuTorchExporter().open(_artifact(tmp_path), threads=2) as runner:
        assert runner.description == "ExecuTorch 0, XNNPACK, 2 threads, rows one after another"
        assert isinstance(runner, ExecuTorchRunner)
        every = runner.prefill(ids, mask, all_positions=True)
        assert every[0].tolist() == [[0, 0, 0], [0, 0, 0], [5, 0, 2], [11, 1, 2]]
        assert every[1].tolist() == [[1, 0, 4], [3, 1, 4], [6, 2, 4], [10, 3, 4]]
        assert runner.prefill(ids, mask).tolist() == [[11, 1, 2], [10, 3, 4]]
        assert runner.decode(np.array([7, 8])).tolist() == [[7, 2, 1], [8, 4, 1]]
        assert runner.decode(np.array([7, 8])).tolist() == [[7, 3, 1], [8, 5, 1]]


@pytest.mark.usefixtures("fake")
def test_a_sequence_the_cache_has_no_room_for_is_refused(tmp_path: Path) -> None:
    with ExecuTorchExporter().open(_artifact(tmp_path)) as runner:
        assert isinstance(runner, ExecuTorchRunner)
        with pytest.raises(BackendError, match=r"10 tokens does not fit .* room for 1 to 9; .* with max_tokens=10 or"):
            runner.prefill(np.ones((1, 10), dtype=np.int64))
        runner.prefill(np.ones((1, 9), dtype=np.int64))
        with pytest.raises(BackendError, match="a sequence of 10 tokens does not fit"):
            runner.decode(np.array([1]))


@pytest.mark.usefixtures("fake")
def test_a_runner_that_has_nothing_to_continue_says_so(tmp_path: Path) -> None:
    runner = ExecuTorchExporter().open(_artifact(tmp_path))
    assert isinstance(runner, ExecuTorchRunner)
    with pytest.raises(BackendError, match=r"the runner is not active; .* use it as a context manager"):
        runner.prefill(np.array([[1]]))
    with runner, pytest.raises(BackendError, match=r"decode was called before prefill; .*; call prefill first"):
        runner.decode(np.array([1]))


@pytest.mark.usefixtures("fake")
def test_inputs_go_to_a_forward_program_by_its_own_order(tmp_path: Path) -> None:
    ids = np.array([[1, 2], [3, 4]])
    with ExecuTorchExporter().open(_artifact(tmp_path, interface="forward")) as runner:
        assert isinstance(runner, ExecuTorchForwardRunner)
        found = runner.forward({"attention_mask": np.ones_like(ids), "input_ids": ids})
        assert found["logits"].tolist() == [[23], [27]]
        with pytest.raises(BackendError, match="the program takes input_ids, attention_mask, it was given input_ids; "):
            runner.forward({"input_ids": ids})
        with pytest.raises(BackendError, match=r"input_ids has shape \(1, 10\), .* with at most 9 tokens"):
            runner.forward({"attention_mask": np.ones((1, 10)), "input_ids": np.ones((1, 10))})
        with pytest.raises(BackendError, match="input_ids, attention_mask have different numbers of rows"):
            runner.forward({"attention_mask": np.ones((1, 2)), "input_ids": ids})


def test_a_runtime_without_xnnpack_is_refused_by_name(fake: Path, tmp_path: Path) -> None:
    fake.write_text(_FAKE.replace("FAKE_BACKENDS", '["QnnBackend"]'))
    with pytest.raises(BackendError, match=r"this ExecuTorch has no XnnpackBackend, it has QnnBackend; .* --force"):
        ExecuTorchExporter().open(_artifact(tmp_path)).__enter__()


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        ("cache", [], r"cache tensor 0 is nothing, the manifest says float32 \[1, 2, 9, 4\]"),
        ("cache", [([1, 2, 9, 4], 6)] * 2, r"cache tensor 1 is float32 \[1, 2, 9, 4\], the manifest says nothing"),
        (
            "cache",
            [([1, 2, 9, 8], 6)],
            r"cache tensor 0 is float32 \[1, 2, 9, 8\], the manifest says float32 \[1, 2, 9",
        ),
        ("outputs", [([1, 3], 5)], r"outputs tensor 0 is float16 \[1, 3\], the manifest says float32 \[1, 3\]"),
    ],
)
def test_a_program_that_is_not_the_manifest_s_is_refused_by_the_tensor(
    kind: str, found: list[tuple[list[int], int]], message: str, tmp_path: Path
) -> None:
    program = {"inputs": [], "outputs": ["float32 [1, 3]"], "cache": ["float32 [1, 2, 9, 4]"]}
    says = {"inputs": [], "outputs": [([1, 3], 6)], "cache": [([1, 2, 9, 4], 6)]} | {kind: found}
    facts = {name: [{"sizes": sizes, "scalar_type": type_} for sizes, type_ in part] for name, part in says.items()}
    artifact = _artifact(tmp_path, program=program)
    with pytest.raises(ArtifactError, match=f"the program's {message}"):
        check_program(artifact, {**facts, "backends": ["XnnpackBackend"]})
