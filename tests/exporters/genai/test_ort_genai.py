"""ONNX Runtime GenAI: its builder's graph of a pruned model computes what PyTorch does, and what is refused.

The reference of every certificate here is the unpruned model with its removed layers passed over.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import zoo
from cli_runs import ROOT, environment
from sglp_deploy import registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import BackendError, ConfigError, ExportError, StorageError, UnsupportedModelError
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.parity import check_parity, prompt_cases
from sglp_deploy.parity.bounds import thresholds_for
from sglp_deploy.parity.reference import TorchRunner
from sglp_deploy.plan import PruningPlan
from sglp_deploy.protocols import Exporter, GeneratingRunner
from sglp_exporters.genai import exporter as ort_genai
from sglp_exporters.genai import runner as genai_runner
from sglp_exporters.genai.exporter import OrtGenaiExporter
from sglp_exporters.genai.runner import OrtGenaiRunner

pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (pip install 'sglp-deploy[genai]')")


@dataclass
class Made:
    """A compressor, the plan that removes a third of its layers, and the artifacts, by precision."""

    compressor: Compressor
    plan: PruningPlan
    artifacts: dict[str, ExportArtifact]

    @property
    def pruned(self) -> torch.nn.Module:
        return self.compressor.materialize(self.plan).module


def _made(family: str, folder: Path, *precisions: str) -> Made:
    compressor = Compressor(tiny.loaded(family))
    plan = compressor.plan_by_hand([i for i in range(compressor.n_layers) if i not in tiny.KEEP[family]])
    artifacts = {
        precision: compressor.export(plan, "ort-genai", folder / precision, precision=precision)
        for precision in precisions
    }
    return Made(compressor, plan, artifacts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _made("llama", tmp_path_factory.mktemp("genai"), "fp32", "int8", "int4")


@pytest.fixture
def runner(made: Made) -> Iterator[OrtGenaiRunner]:
    with OrtGenaiExporter().open(made.artifacts["fp32"], threads=1) as opened:
        yield opened


def _specimen(name: str) -> Compressor:
    specimen = next(each for each in zoo.specimens() if each.name == name)
    module = specimen.build()
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, name)))


def test_the_exporter_and_its_runner_are_what_the_protocols_ask_for(made: Made) -> None:
    exporter = registry.exporter("ort-genai")
    assert isinstance(exporter, Exporter)
    assert isinstance(exporter.open(made.artifacts["fp32"]), GeneratingRunner)


def test_a_pruned_decoder_is_certified_in_float32(made: Made) -> None:
    report = made.compressor.verify(made.artifacts["fp32"], threads=1)
    assert report.passed, report.reasons
    assert report.precision == "fp32"
    assert report.runner.startswith("ONNX Runtime GenAI 0.")
    assert report.runner.endswith("on cpu, rows one after another")


def test_a_broken_pattern_of_windows_is_built_from_layer_types(tmp_path: Path) -> None:
    # Gemma-2 alternates; the builder must read the list, for the kept layers no longer alternate.
    compressor = _specimen("gemma2")
    plan = compressor.plan_by_hand([0, 3, 6])
    kinds = compressor.materialize(plan).module.config.layer_types
    assert kinds == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    report = compressor.verify(compressor.export(plan, "ort-genai", tmp_path / "artifact"), threads=1)
    assert report.passed, report.reasons
    assert "beyond window 8" in " ".join(case["name"] for case in report.cases)


@pytest.mark.slow
def test_a_family_that_keeps_a_convolution_s_state_is_certified_too(tmp_path: Path) -> None:
    compressor = _specimen("lfm2")
    artifact = compressor.export(compressor.plan_by_hand([0, 3, 4]), "ort-genai", tmp_path / "artifact")
    assert artifact.inputs == ()
    report = compressor.verify(artifact, threads=1)
    assert report.passed, report.reasons


@pytest.mark.slow
def test_a_window_the_builder_does_not_see_would_end_in_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_genai, "_check_window", lambda _config: None)
    compressor = _specimen("mistral")
    artifact = compressor.export(compressor.plan_by_hand([1, 4]), "ort-genai", tmp_path / "artifact")
    with pytest.raises(
        BackendError, match=r"ONNX Runtime GenAI failed on a sequence of .* tokens; .*; check the tokens"
    ):
        compressor.verify(artifact, threads=1)


def test_the_folder_holds_what_the_runtime_reads_and_nothing_else(made: Made) -> None:
    artifact = made.artifacts["fp32"]
    assert sorted(artifact.files) == [
        "chat_template.jinja",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "sglp_plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(file.name for file in artifact.path.iterdir()) == sorted([*artifact.files, "manifest.json"])
    assert (artifact.n_layers, artifact.plan_digest) == (4, made.plan.digest())
    assert artifact.details["model_precision"] == "fp32"
    assert artifact.details["operators"]["GroupQueryAttention"] == 4
    cache = {spec.name: spec for spec in artifact.inputs if spec.name.startswith("past_key_values.")}
    assert len(cache) == 8
    assert cache["past_key_values.3.value"].shape == ("batch_size", 2, "past_sequence_length", 32)
    assert str(ROOT) not in (artifact.path / "genai_config.json").read_text()


def test_quantised_weights_are_smaller_and_judged_by_the_bounds_of_their_type(made: Made) -> None:
    sizes = [made.artifacts[precision].weight_bytes for precision in ("int4", "int8", "fp32")]
    assert sizes[0] < sizes[1] < sizes[2] / 2
    for precision in ("int8", "int4"):
        report = made.compressor.verify(made.artifacts[precision], threads=1)
        assert report.passed, report.reasons
        assert report.thresholds["kl_p99"] == thresholds_for(precision).kl_p99
        assert report.runner.endswith(f"; weights are {precision}, the reference's are not")
        assert report.reference == "PyTorch, 4 layers, fp32"
    worst = [_kl(made, precision) for precision in ("fp32", "int8", "int4")]
    assert worst[0] < worst[1] / 1000
    assert worst[1] < worst[2] / 10


def _kl(made: Made, precision: str) -> float:
    report = made.compressor.verify(made.artifacts[precision], threads=1)
    return max(case["statistics"]["kl_max"] for case in report.cases)


def test_a_quantised_artifact_of_other_layers_fails(made: Made) -> None:
    other = made.compressor.materialize(made.compressor.plan_by_hand([1, 3])).module
    assert other.config.num_hidden_layers == 4
    artifact = made.artifacts["int4"]
    with OrtGenaiExporter().open(artifact, threads=1) as judged, TorchRunner(other) as reference:
        report = check_parity(artifact, judged, reference, prompt_cases(np.arange(200)), decode_steps=4)
    assert not report.passed


def test_the_command_line_compares_int4_with_the_float32_model(tmp_path: Path) -> None:
    compressor = Compressor.from_pretrained(tiny.save_tiny(tmp_path / "model", num_hidden_layers=2))
    compressor.export(compressor.plan_by_hand([0]), "ort-genai", tmp_path / "artifact", precision="int4")
    arguments = ["verify", str(tmp_path / "artifact"), "--threads", "1", "-o", str(tmp_path / "parity.json"), "-q"]
    assert main(arguments) == 0
    assert "1 layers, fp32" in (tmp_path / "parity.json").read_text()


def test_steps_through_the_cache_equal_one_pass_over_the_whole_text(made: Made, runner: OrtGenaiRunner) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    with torch.no_grad():
        wanted = made.pruned(torch.as_tensor(ids)).logits.numpy()
    np.testing.assert_allclose(runner.prefill(ids, all_positions=True), wanted, atol=2e-5)
    np.testing.assert_allclose(runner.prefill(ids[:, :7]), wanted[:, 6], atol=2e-5)
    for position in range(7, 12):
        # What runs between two steps must not touch the cache.
        np.testing.assert_allclose(runner.forward({"input_ids": ids})["logits"], wanted, atol=2e-5)
        np.testing.assert_allclose(runner.decode(ids[:, position]), wanted[:, position], atol=2e-5)


def test_padding_is_left_out_and_its_logits_are_zero(made: Made, runner: OrtGenaiRunner) -> None:
    ids = np.random.default_rng(0).integers(0, 256, (2, 6))
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    found = runner.prefill(ids, mask, all_positions=True)
    with torch.no_grad():
        wanted = made.pruned(torch.as_tensor(ids[:1, 2:])).logits.numpy()
    np.testing.assert_allclose(found[:1, 2:], wanted, atol=2e-5)
    assert not found[0, :2].any()


def test_a_sequence_that_outgrows_its_cache_goes_on(
    made: Made, runner: OrtGenaiRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai_runner, "_ROOM", 3)
    ids = np.random.default_rng(0).integers(0, 256, (1, 20))
    with torch.no_grad():
        wanted = made.pruned(torch.as_tensor(ids)).logits.numpy()
    runner.prefill(ids[:, :5])
    for position in range(5, 20):
        np.testing.assert_allclose(runner.decode(ids[:, position]), wanted[:, position], atol=2e-5)


def test_a_context_that_is_full_is_refused(runner: OrtGenaiRunner) -> None:
    with pytest.raises(BackendError, match="256 tokens leave no room in a context of 256; ONNX Runtime GenAI stops"):
        runner.prefill(np.zeros((1, 256), dtype=np.int64))


def test_a_runner_that_is_not_entered_or_not_filled_says_so(made: Made, runner: OrtGenaiRunner) -> None:
    with pytest.raises(BackendError, match="decode was called before prefill"):
        runner.decode(np.array([1]))
    with pytest.raises(BackendError, match="the runner is not active; its graph is loaded by 'with'"):
        OrtGenaiExporter().open(made.artifacts["fp32"]).prefill(np.zeros((1, 1), dtype=np.int64))


def test_a_device_it_was_not_built_for_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match="built for the cpu, not for 'cuda'; a number taken there would be mislabel"):
        OrtGenaiExporter().open(made.artifacts["fp32"], device="cuda")


def test_a_folder_that_lost_its_weights_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.artifacts["fp32"].path, tmp_path / "damaged")
    damaged = ExportArtifact.load(tmp_path / "damaged")
    (damaged.path / "model.onnx.data").unlink()
    with pytest.raises(BackendError, match=r"ONNX Runtime GenAI 0\S+ cannot load .*damaged; .*; export it again"):
        OrtGenaiExporter().open(damaged).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precison": "int4"}, "option of exporter 'ort-genai' .*precison.*precision"),
        ({"precision": "fp16"}, "precision='fp16' is not offered; weights are fp32, int8, int4 here"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    made: Made, options: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        made.compressor.export(made.plan, "ort-genai", out, **options)
    assert not out.exists()


def test_models_it_cannot_export_are_refused_with_the_reason(out: Path) -> None:
    tokenizer = tiny.tokenizer()

    def refusal(module: torch.nn.Module, with_tokenizer: bool = True) -> str:
        loaded = LoadedModel(module, tokenizer if with_tokenizer else None, source_of(module, "made"))
        compressor = Compressor(loaded)
        with pytest.raises((ConfigError, UnsupportedModelError, BackendError)) as caught:
            compressor.export(compressor.keep_all(), "ort-genai", out)
        assert list(out.parent.iterdir()) == []
        return str(caught.value)

    assert "the weights are bf16; the builder's graphs for CPUs compute in float32" in refusal(
        tiny.model().to(torch.bfloat16)
    )
    assert "the model has no tokenizer; the builder copies it" in refusal(tiny.model(), with_tokenizer=False)
    models = {name: next(each for each in zoo.specimens() if each.name == name).build() for name in ("bert", "mistral")}
    assert "BertForMaskedLM is no decoder language model; ONNX Runtime GenAI runs nothing else" in refusal(
        models["bert"]
    )
    assert "every layer of this mistral attends through a window of 8 tokens, which ONNX Runtime GenAI's" in refusal(
        models["mistral"]
    )
    unknown = next(each for each in zoo.specimens() if each.name == "gpt_neox").build()
    assert "ONNX Runtime GenAI's builder does not know GPTNeoXForCausalLM; it knows chosen" in refusal(unknown)


def test_a_builder_that_fails_is_quoted_and_leaves_nothing(
    made: Made, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: Any, **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", f"Traceback\n{words}\n")

    monkeypatch.setattr(ort_genai.children, "run", failing)
    words = "KeyError: 'rope_type'"
    with pytest.raises(BackendError, match="builder failed on this LlamaForCausalLM; KeyError: 'rope_type'; export it"):
        made.compressor.export(made.plan, "ort-genai", out)
    words = "OSError: [Errno 28] No space left on device"
    with pytest.raises(StorageError, match="no space left on the device"):
        made.compressor.export(made.plan, "ort-genai", out)
    assert list(out.parent.iterdir()) == []


def test_gpt_oss_is_refused_where_the_builder_would_take_a_layer_for_another_kind(out: Path) -> None:
    compressor = _specimen("gpt_oss")
    with pytest.raises(ExportError, match="'ort-genai' derives the type of a gpt_oss layer from its number and would"):
        compressor.export(compressor.plan_by_hand([0, 3]), "ort-genai", out)
    assert not out.exists()


def test_the_builder_still_works_out_the_kind_of_gpt_oss_layers_alone() -> None:
    """The declaration follows the installed builder's source; another release may read the list everywhere, or not."""
    spec = find_spec("onnxruntime_genai")
    assert spec is not None
    assert spec.origin is not None
    sources = {file.name: file.read_text() for file in (Path(spec.origin).parent / "models/builders").glob("*.py")}
    assigned = {name: [line for line in text.splitlines() if "is_local =" in line] for name, text in sources.items()}
    assert {name: lines for name, lines in assigned.items() if lines} == {
        "gptoss.py": ["        self.is_local = lambda layer_id: bool(layer_id % 2 == 0)"]
    }
    rule: Callable[[str], Any] = OrtGenaiExporter().layer_type_formula
    assert [rule("gpt_oss")(index) for index in range(3)] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert rule("gemma2") is None


def test_a_worker_that_runs_it_does_not_load_torch(made: Made) -> None:
    program = (
        "import sys\n"
        "from sglp_deploy import registry\n"
        "from sglp_deploy.artifact import ExportArtifact\n"
        f"artifact = ExportArtifact.load({str(made.artifacts['int4'].path)!r})\n"
        "with registry.exporter('ort-genai').open(artifact, threads=1) as runner:\n"
        "    import numpy\n"
        "    runner.prefill(numpy.zeros((1, 3), dtype=numpy.int64))\n"
        "print('torch' in sys.modules, 'onnx' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment(), cwd=ROOT
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
