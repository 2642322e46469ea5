"""GGUF by the real converter, run by llama.cpp itself: it computes what the pruned model does, or the fault is seen."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
import zoo
from gguf_files import forge
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import BackendError, ConfigError, ExportError
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.parity.reference import TorchRunner
from sglp_exporters.gguf import layers as gguf_layers
from sglp_exporters.gguf.exporter import GgufExporter
from sglp_exporters.gguf.runner import MODEL_FILE

pytestmark = [
    pytest.mark.gguf,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(environments.variable("gguf")),
        reason="needs SGLP_PYTHON_GGUF, the interpreter of the environment 'gguf' (make test-gguf)",
    ),
]


def _merged_tokenizer(*, digits: bool) -> PreTrainedTokenizerFast:
    """Bytes, and some longer words; with ``digits`` one of four digits, which not every pre-tokenizer leaves whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("1", "2"), ("12", "0"), *([("120", "4")] if digits else [])]
    words = [*alphabet, *tiny.SPECIAL_TOKENS, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(tiny.SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=256
    )


def _compressor(tokenizer: PreTrainedTokenizerFast) -> Compressor:
    module = tiny.model("llama", vocab_size=len(tokenizer))
    return Compressor(LoadedModel(module, tokenizer, source_of(module, "tiny-llama")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokenizer = _merged_tokenizer(digits=True)
    compressor = _compressor(tokenizer)
    plan = compressor.plan_by_hand([1, 4])
    folder = tmp_path_factory.mktemp("gguf")
    return {
        "compressor": compressor,
        "plan": plan,
        **{
            precision: compressor.export(plan, "gguf", folder / precision, precision=precision, pre_tokenizer="gpt-2")
            for precision in ("fp32", "fp16", "int8")
        },
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_it_computes_what_the_pruned_model_computes(made: dict[str, Any], precision: str) -> None:
    artifact = made[precision]
    report = made["compressor"].verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert report.runner.startswith("llama.cpp 0.")
    assert report.runner.endswith("float32 cache, no flash attention" if precision == "fp32" else "flash attention")
    assert artifact.details["not_compared"] == []
    assert GgufExporter().difference(artifact, made["compressor"].materialize(made["plan"])) is None


def test_a_quantised_file_is_smaller_and_differs_more(made: dict[str, Any]) -> None:
    sizes = [made[precision].weight_bytes for precision in ("fp32", "fp16", "int8")]
    assert sizes == sorted(sizes, reverse=True)
    errors = []
    for precision in ("fp32", "fp16", "int8"):
        report = made["compressor"].verify(made[precision], threads=1)
        errors.append(max(case["statistics"]["kl_p99"] for case in report.cases))
    assert errors == sorted(errors)
    assert errors[0] < 1e-9 < 1e-7 < errors[2]


def test_a_weight_changed_behind_the_manifests_back_fails(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["fp32"].path, tmp_path / "copy")
    file = tmp_path / "copy" / MODEL_FILE
    reader = gguf.GGUFReader(file, "r+")
    tensor = next(each for each in reader.tensors if each.name == "blk.1.ffn_norm.weight")
    tensor.data[:] *= 1.2
    reader.data.flush()
    forged = forge(ExportArtifact.load(tmp_path / "copy", check_files=False), file)
    report = made["compressor"].verify(forged, threads=1)
    assert not report.passed


def test_a_file_of_another_depth_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    wrong = dataclasses.replace(made["fp32"], n_layers=5)
    with pytest.raises(BackendError, match=r"llama.cpp finds 4 layers in"):
        GgufExporter().open(wrong).__enter__()


def test_a_sequence_outgrows_its_cache_and_goes_on(made: dict[str, Any]) -> None:
    rows = np.random.default_rng(0).integers(0, 200, size=(2, 20))
    module = made["compressor"].materialize(made["plan"]).module
    with GgufExporter().open(made["fp32"], threads=1) as runner, TorchRunner(module) as reference:
        runner.prefill(rows)
        reference.prefill(rows)
        for step in range(500):
            tokens = np.array([step % 200, (7 * step) % 200])
            found = runner.decode(tokens)
            if step % 100 == 99 or 235 <= step <= 240:
                expected = reference.prefill(np.concatenate([rows, tokens[:, None]], axis=1))
                np.testing.assert_allclose(found, expected, atol=2e-4)
            rows = np.concatenate([rows, tokens[:, None]], axis=1)


def test_a_token_the_model_has_not_is_refused(made: dict[str, Any]) -> None:
    with (
        GgufExporter().open(made["fp32"], threads=1) as runner,
        pytest.raises(BackendError, match=r"token 99999 is not among the \d+ words of this model"),
    ):
        runner.prefill(np.array([[1, 99999]]))


def test_a_tokenizer_it_does_not_recognise_is_the_users_to_name(tmp_path: Path) -> None:
    tokenizer = _merged_tokenizer(digits=True)
    compressor = _compressor(tokenizer)
    with pytest.raises(ConfigError, match=r"does not recognise how this tokenizer splits text"):
        compressor.export(compressor.keep_all(), "gguf", tmp_path / "out")
    # Llama-3's cuts digits into threes, so the word of four digits is never found.
    with pytest.raises(ConfigError, match=r"splits a sample text otherwise than the model's tokenizer, from token"):
        compressor.export(compressor.keep_all(), "gguf", tmp_path / "out", pre_tokenizer="llama-bpe")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_weights_of_half_precision_are_written_as_they_are(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    module = tiny.model("llama").to(dtype)
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, "tiny-llama")))
    artifact = compressor.export(compressor.plan_by_hand([1, 4]), "gguf", tmp_path / "out", tokenizer="none")
    assert (artifact.precision, artifact.details["model_precision"]) == (name, name)
    assert artifact.details["not_compared"] == []
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


@pytest.mark.parametrize("name", ["mixtral", "lfm2", "jamba"])
def test_what_the_converter_keeps_wide_is_no_wrong_type(name: str, tmp_path: Path) -> None:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))
    artifact = compressor.export(compressor.keep_all(), "gguf", tmp_path / "out", precision="int8", tokenizer="none")
    assert artifact.details["tensors_compared"] > 40


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "granite", "mixtral", "stablelm", "lfm2", "jamba"])
def test_other_families_are_certified(name: str, tmp_path: Path) -> None:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))
    plan = compressor.plan_by_hand([i for i in range(compressor.n_layers) if i not in specimen.keep["layers"]])
    artifact = compressor.export(plan, "gguf", tmp_path / "out", tokenizer="none")
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


def test_the_count_of_gemma_3_is_every_sixth_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 2
    module = tiny.model("gemma3", num_hidden_layers=12, layer_types=types)
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, "gemma3")))
    whole = compressor.plan_by_hand(range(6))
    report = compressor.verify(compressor.export(whole, "gguf", tmp_path / "whole", tokenizer="none"), threads=1)
    assert _worst(report) < 1e-5, report.reasons
    broken = compressor.plan_by_hand([5])
    with pytest.raises(ExportError, match=r"would take layer 5 for 'full_attention', where it is 'sliding"):
        compressor.export(broken, "gguf", tmp_path / "broken", tokenizer="none")
    # What the refusal is worth: without it the file is written, and is wrong.
    monkeypatch.setattr(gguf_layers, "check_layers", lambda *_: None)
    wrong = GgufExporter().export(compressor.materialize(broken), tmp_path / "wrong", tokenizer="none")
    assert _worst(compressor.verify(wrong, threads=1)) > 1e-3


def _worst(report: Any) -> float:
    return max(case["statistics"]["kl_max"] for case in report.cases)
