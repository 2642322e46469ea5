"""The public object: the stages in order on a saved folder, its refusals, and what it never does twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from sglp_deploy import CalibrationSet, Compressor, registry
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, CalibrationError, ConfigError, ParityError, PlanError
from sglp_deploy.evidence import lazy
from sglp_deploy.models import LoadedModel
from sglp_deploy.plan import PruningPlan

SMALL = {"max_tokens": 600, "sequence_length": 48, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("\n\n".join(CalibrationSet.builtin().documents[:4]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def compressor(folder: Path) -> Compressor:
    return Compressor.from_pretrained(folder, calibration=CalibrationSet.builtin(**SMALL))


@pytest.fixture(scope="module")
def plan(compressor: Compressor) -> PruningPlan:
    return compressor.plan(drop=2)


@pytest.fixture(scope="module")
def artifact(compressor: Compressor, plan: PruningPlan, tmp_path_factory: pytest.TempPathFactory) -> ExportArtifact:
    return compressor.export(plan, "torch", tmp_path_factory.mktemp("out") / "torch")


# ------------------------------------------------------------------------------------------------- the stages in order


def test_the_documented_calls_go_from_a_folder_to_a_certified_onnx_artifact(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model("llama").state_dict().items()}
    compressor = Compressor.from_pretrained(folder, calibration=CalibrationSet.from_text(text_file, **SMALL))
    plan = compressor.plan(drop=2)
    pruned = compressor.materialize(plan)
    artifact = compressor.export(plan, "onnx", tmp_path / "out" / "pruned")
    baseline = compressor.export(compressor.keep_all(), "onnx", tmp_path / "out" / "baseline")
    parity = compressor.verify(artifact, threads=1)
    assert parity.passed, parity.reasons
    assert parity.artifact_digest == artifact.digest
    assert parity.reference == "PyTorch, 4 layers, fp32"
    assert pruned.n_layers == artifact.n_layers == 4
    assert baseline.n_layers == 6
    assert artifact.weight_bytes < baseline.weight_bytes
    assert compressor.n_layers == 6
    # The caller's model is never mutated.
    assert all(torch.equal(tensor, before[name]) for name, tensor in compressor.model.state_dict().items())


def test_a_saved_checkpoint_loads_without_us_and_computes_what_was_materialized(
    compressor: Compressor, plan: PruningPlan, tmp_path: Path
) -> None:
    saved = compressor.save(plan, tmp_path / "checkpoint")
    again = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, compressor.materialize(plan).module(ids).logits)
    assert again.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("budget", "kept"),
    [({"drop": 2}, 4), ({"drop": 0}, 6), ({"keep": 5}, 5), ({"keep": 1}, 1), ({"drop": 0.5}, 3), ({"drop": 0.34}, 4)],
)
def test_a_plan_keeps_what_the_budget_says(compressor: Compressor, budget: dict[str, Any], kept: int) -> None:
    plan = compressor.plan(**budget)
    assert len(plan.keep) == kept
    assert plan.method == "sglp"
    assert plan.model["fingerprint"] == compressor.source["fingerprint"]
    assert compressor.materialize(plan).n_layers == kept


def test_a_parameter_budget_is_met_with_the_fewest_removals(compressor: Compressor) -> None:
    whole = sum(p.numel() for p in compressor.model.parameters())
    layer = sum(p.numel() for p in compressor.model.model.layers[0].parameters())
    plan = compressor.plan(max_parameters=whole - 2 * layer)
    assert len(plan.drop) == 2
    assert compressor.materialize(plan).n_parameters == whole - 2 * layer
    assert len(compressor.plan(max_parameters=whole - 2 * layer - 1).drop) == 3
    assert plan.model["parameters"] == whole
    assert plan.model["layer_parameters"] == [layer] * 6


def test_options_reach_the_planner(compressor: Compressor) -> None:
    plan = compressor.plan(drop=2, criterion="block-influence", n_segments=3, quota="proportional")
    assert (plan.criterion, plan.quota, len(plan.segments)) == ("block-influence", "proportional", 3)


def test_the_keep_all_plan_is_the_model_itself(compressor: Compressor) -> None:
    plan = compressor.keep_all()
    assert (plan.method, plan.keep, plan.drop) == ("keep-all", tuple(range(6)), ())
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        assert torch.equal(compressor.materialize(plan).module(ids).logits, compressor.model(ids).logits)


def test_evaluate_tells_dense_from_pruned_on_held_out_text(compressor: Compressor, plan: PruningPlan) -> None:
    report = compressor.evaluate(plan, CalibrationSet.builtin_held_out(**SMALL))
    assert report["dense"]["perplexity"] != report["pruned"]["perplexity"]
    assert report["protocol"]["text"] == "builtin:held-out"
    same = compressor.evaluate(compressor.keep_all(), CalibrationSet.builtin_held_out(**SMALL))
    assert same["ratio"] == 1.0
    json.dumps(report, allow_nan=False)


def test_evaluate_uses_the_held_out_prose_in_chunks_of_512_when_no_text_is_given(
    compressor: Compressor, plan: PruningPlan
) -> None:
    protocol = compressor.evaluate(plan)["protocol"]
    assert (protocol["text"], protocol["chunk_tokens"]) == ("builtin:held-out", 512)
    assert protocol["n_tokens"] + protocol["n_chunks"] == 16_384


# ------------------------------------------------------------------------------------------- once, and always the same


def test_statistics_are_taken_once_for_all_plans(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    collect = lazy.collect_layer_stats

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return collect(*arguments, **options)

    monkeypatch.setattr(lazy, "collect_layer_stats", counted)
    fresh = Compressor.from_pretrained(folder, calibration=CalibrationSet.builtin(**SMALL))
    fresh.keep_all()
    assert calls == []
    fresh.plan(drop=1)
    fresh.plan(keep=2, criterion="taylor")
    assert calls == [1]
    assert fresh.stats() is fresh.stats()


def test_equal_seeds_give_equal_plans_and_another_seed_other_text(folder: Path) -> None:
    def make(seed: int) -> PruningPlan:
        calibration = CalibrationSet.builtin(**SMALL, seed=seed)
        return Compressor.from_pretrained(folder, calibration=calibration).plan(drop=2)

    first, second, other = make(5), make(5), make(6)
    assert first.digest() == second.digest()
    assert first.scores == second.scores
    assert other.calibration is not None
    assert first.calibration is not None
    assert other.calibration["digest"] != first.calibration["digest"]
    assert other.digest() != first.digest()


def test_progress_names_every_stage_and_ends_at_its_total(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    watched = Compressor.from_pretrained(
        folder,
        calibration=CalibrationSet.builtin(**SMALL),
        progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )
    plan = watched.plan(drop=1)
    watched.verify(watched.export(plan, "torch", tmp_path / "out"))
    watched.evaluate(plan, CalibrationSet.builtin_held_out(**SMALL))
    assert list(seen) == ["calibrate", "verify", "evaluate dense", "evaluate pruned"]
    for steps in seen.values():
        total = steps[-1][1]
        assert steps == [(done, total) for done in range(1, total + 1)]


# --------------------------------------------------------------------------------------------- refused before the work


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"drop": 6}, PlanError, "drop=6 removes all 6 layers; at least one must stay; pass drop<=5"),
        ({"keep": 7}, PlanError, "keep=7 exceeds the model's 6 layers; a plan only removes; pass keep<=6"),
        ({}, ConfigError, "the budget sets nothing; "),
        ({"drop": 1, "keep": 2}, ConfigError, "the budget sets drop and keep; "),
        (
            {"drop": 1, "method": "sgpl"},
            ConfigError,
            "unknown method 'sgpl'; nothing is registered under that name; did you mean 'sglp'? the choices are ",
        ),
        ({"max_parameters": 1000}, PlanError, "max_parameters=1000 cannot be met; embeddings, head and one layer "),
    ],
)
def test_what_cannot_work_is_refused_before_calibration(
    folder: Path,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("calibration was started")

    monkeypatch.setattr(lazy, "collect_layer_stats", never)
    fresh = Compressor.from_pretrained(folder)
    with pytest.raises(error) as caught:
        fresh.plan(**arguments)
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match=r"unknown option of planner 'sglp' 'n_segment'; .*did you mean 'n_segments'"):
        fresh.plan(drop=1, n_segment=3)


def test_the_least_parameter_budget_named_is_accepted(compressor: Compressor) -> None:
    with pytest.raises(PlanError) as caught:
        compressor.plan(max_parameters=1)
    least = int(str(caught.value).rpartition(">=")[2])
    assert len(compressor.plan(max_parameters=least, n_segments=1).keep) == 1


def test_a_plan_of_another_model_is_refused(compressor: Compressor, tmp_path: Path) -> None:
    other = tiny.plan_for(tiny.model("llama", seed=1), (0, 1))
    for action in (
        lambda: compressor.materialize(other),
        lambda: compressor.export(other, "torch", tmp_path / "out"),
        lambda: compressor.evaluate(other, CalibrationSet.builtin_held_out(**SMALL)),
    ):
        with pytest.raises(PlanError, match=r"^the plan is for tiny \(fingerprint .*; make a plan for this model$"):
            action()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- verify


def test_verify_reads_the_plan_from_the_artifact_and_certifies_it(
    compressor: Compressor, plan: PruningPlan, artifact: ExportArtifact
) -> None:
    report = compressor.verify(artifact)
    assert report.passed, report.reasons
    assert report.artifact_digest == artifact.digest
    assert report.runner == artifact.details["runner"]
    assert compressor.verify(artifact, plan, text=CalibrationSet.builtin(**SMALL)).passed


def test_verify_refuses_an_artifact_of_another_plan(compressor: Compressor, artifact: ExportArtifact) -> None:
    with pytest.raises(PlanError) as caught:
        compressor.verify(artifact, compressor.keep_all())
    assert str(caught.value) == (
        f"the artifact in {artifact.path} was made by another plan ({artifact.plan_digest[:12]}, not "
        f"{compressor.keep_all().digest()[:12]}); a certificate would be about something else; give the plan it was "
        "made by"
    )


def test_verify_refuses_an_artifact_of_another_model(artifact: ExportArtifact) -> None:
    other = Compressor(tiny.loaded(seed=1), calibration=CalibrationSet.builtin(**SMALL))
    with pytest.raises(PlanError, match=r"^the plan is for .* and not for "):
        other.verify(artifact)


def test_verify_refuses_an_artifact_that_lost_its_plan(
    compressor: Compressor, plan: PruningPlan, tmp_path: Path
) -> None:
    lost = compressor.export(plan, "torch", tmp_path / "out")
    (lost.path / "sglp_plan.json").unlink()
    with pytest.raises(ArtifactError, match=r"sglp_plan.json does not exist; one of our plan files was expected there"):
        compressor.verify(lost)


def test_verify_fails_an_artifact_whose_weights_were_changed_afterwards(
    compressor: Compressor, plan: PruningPlan, tmp_path: Path
) -> None:
    damaged = compressor.export(plan, "torch", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(damaged.path)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.01)
    model.save_pretrained(damaged.path)
    report = compressor.verify(damaged)
    assert not report.passed
    with pytest.raises(ParityError, match="the torch artifact does not match its reference; prompt 1: KL p99 is "):
        report.require()


def test_verify_refuses_a_runner_that_cannot_generate(
    compressor: Compressor, artifact: ExportArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ForwardOnly:
        name, requires = "torch", ()

        def open(self, artifact: ExportArtifact, **options: Any) -> object:
            return object()

    monkeypatch.setattr(registry, "exporter", lambda name: ForwardOnly())
    with pytest.raises(ConfigError) as caught:
        compressor.verify(artifact)
    assert str(caught.value) == ("the torch runner cannot generate; decoder parity needs prefill and decode; add them")


def test_verify_goes_beyond_the_window_of_a_model_that_has_one(tmp_path: Path) -> None:
    gemma = Compressor(tiny.loaded("gemma3"), calibration=CalibrationSet.builtin(**SMALL))
    report = gemma.verify(gemma.export(gemma.plan(keep=4), "torch", tmp_path / "sliding"))
    assert report.passed, report.reasons
    assert "prompt 72 (beyond window 8)" in [case["name"] for case in report.cases]
    # Without a sliding layer left there is no window to go beyond.
    full = tiny.plan_for(gemma.model, (2, 5))
    report = gemma.verify(gemma.export(full, "torch", tmp_path / "full"))
    assert report.passed, report.reasons
    assert len(report.cases) == 4


# --------------------------------------------------------------------------------------------------- without tokenizer


def test_a_model_without_a_tokenizer_goes_from_token_ids_to_a_certificate(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "model")
    rows = list(np.random.default_rng(0).integers(0, 256, (12, 48)))
    bare = Compressor.from_pretrained(
        tmp_path / "model", calibration=CalibrationSet.from_token_ids(rows, sequence_length=48)
    )
    assert bare.tokenizer is None
    plan = bare.plan(drop=2)
    assert bare.verify(bare.export(plan, "torch", tmp_path / "out")).passed
    report = bare.evaluate(plan, CalibrationSet.from_token_ids(rows[:3], sequence_length=48))
    assert report["protocol"]["n_tokens"] == 3 * 47
    with pytest.raises(CalibrationError, match="builtin:held-out is text, but the model has no tokenizer; "):
        bare.evaluate(plan)


def test_a_model_without_a_tokenizer_and_with_text_says_so() -> None:
    whole = tiny.loaded()
    bare = Compressor(LoadedModel(whole.module, None, whole.source))
    with pytest.raises(CalibrationError, match="builtin:calibration is text, but the model has no tokenizer; "):
        bare.plan(drop=1)
