from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from exports import compressed
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, BackendError, ConfigError, StorageError
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.protocols import GeneratingRunner
from sglp_exporters.checkpoint.exporter import TorchExporter
from sglp_exporters.vllm.exporter import VllmExporter

BOTH = pytest.mark.parametrize("exporter", [TorchExporter(), VllmExporter()], ids=lambda exporter: exporter.name)


@BOTH
def test_the_folder_is_a_checkpoint_with_a_manifest(exporter: Any, out: Path) -> None:
    model = compressed("gemma3", tiny.KEEP["gemma3"])
    artifact = exporter.export(model, out)
    launch = ["vllm_serve.json"] if exporter.name == "vllm" else []
    assert sorted(artifact.files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "sglp_plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *launch,
    ]
    assert (artifact.format, artifact.precision, artifact.n_layers) == (exporter.name, "fp32", 4)
    assert artifact.inputs == artifact.outputs == ()
    assert artifact.plan_digest == model.plan.digest()
    assert artifact.model == model.source.to_json()
    assert 0 <= artifact.weight_bytes - 4 * model.n_parameters < 8192  # the header of the file
    assert ExportArtifact.load(out).digest == artifact.digest


@BOTH
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_its_runner_computes_what_the_pruned_model_computes(exporter: Any, family: str, out: Path) -> None:
    model = compressed(family, tiny.KEEP[family])
    ids = np.random.default_rng(0).integers(0, 256, (2, 20))
    runner = exporter.open(exporter.export(model, out), threads=1)
    assert isinstance(runner, GeneratingRunner)
    with runner, TorchRunner(model.module) as reference:
        np.testing.assert_array_equal(runner.prefill(ids), reference.prefill(ids))
        np.testing.assert_array_equal(runner.decode(ids[:, 0]), reference.decode(ids[:, 0]))
        np.testing.assert_array_equal(*(side.forward({"input_ids": ids})["logits"] for side in (runner, reference)))


def test_the_vllm_folder_says_what_vllm_asks_for(out: Path) -> None:
    artifact = VllmExporter().export(compressed("qwen2", (0, 1, 3, 5)), out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == artifact.details["architectures"] == ["Qwen2ForCausalLM"]
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 4
    assert config["max_window_layers"] == 2
    assert config["dtype"] == "float32"
    assert artifact.details["serve"] == "vllm serve . --dtype float32"
    launch = json.loads((out / "vllm_serve.json").read_text())
    assert launch["arguments"] == ["serve", ".", "--dtype", "float32"]
    # Two heads share one key-value head: it is repeated, and the two heads go to two processors at most.
    assert launch["tensor_parallel"]["2"] == "yes"
    assert launch["tensor_parallel"]["4"] == "no: 2 attention heads cannot be divided by 4"
    assert "vllm_serve.json" in artifact.files
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 4
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE


@BOTH
def test_a_failed_export_leaves_nothing(exporter: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglp_exporters.runners import checkpoint

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(
        StorageError, match=rf"cannot write {out}; no space left on the device; free some space and run"
    ):
        exporter.export(compressed("llama", (0, 1)), out)
    assert list(out.parent.iterdir()) == []


@BOTH
def test_options_are_refused(exporter: Any, out: Path) -> None:
    model = compressed("llama", (0, 1))
    with pytest.raises(
        ConfigError, match=rf"exporter '{exporter.name}' does not know quantize; it writes the weights as"
    ):
        exporter.export(model, out, quantize="int4")
    artifact = exporter.export(model, out)
    with pytest.raises(ConfigError, match=r"unknown option of a runner for .* 'gpu'"):
        exporter.open(artifact, gpu=True)


@BOTH
def test_an_altered_checkpoint_is_noticed(exporter: Any, out: Path) -> None:
    exporter.export(compressed("llama", (0, 1)), out)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs from its digest in the manifest"):
        ExportArtifact.load(out)


def test_a_runner_outside_with_has_no_model(out: Path) -> None:
    runner = TorchExporter().open(TorchExporter().export(compressed("llama", (0, 1)), out))
    for use in (runner.synchronize, lambda: runner.prefill(np.array([[1]])), lambda: runner.forward({})):
        with pytest.raises(BackendError, match=r"the runner is not active; its model is loaded by 'with'; use it as a"):
            use()
    with runner:
        runner.prefill(np.array([[1, 2]]))
    with pytest.raises(BackendError, match=r"the runner is not active"):
        runner.prefill(np.array([[1, 2]]))


def test_a_checkpoint_that_cannot_be_loaded_or_placed_says_so(out: Path) -> None:
    artifact = TorchExporter().export(compressed("llama", (0, 1)), out)
    with pytest.raises(BackendError, match=r"transformers cannot load .* on tpu; .*; check the device, or export"):
        TorchExporter().open(artifact, device="tpu").__enter__()
    (out / "model.safetensors").write_bytes(b"")
    with pytest.raises(BackendError, match=r"transformers cannot load .* on cpu; .*; check the device, or export the"):
        TorchExporter().open(artifact).__enter__()
