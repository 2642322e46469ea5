"""Artifacts of plans that change weights: certified in every format that is written from the model in memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import mutations
import tiny
import zoo
from exports import share_traces
from overlays import overlay_of
from sglp_bench.judge.certificates import certification, require_certificates
from sglp_deploy import CalibrationSet, Compressor
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.errors import ArtifactError, PlanError
from sglp_deploy.models import LoadedModel, source_of
from sglp_deploy.overlay import OVERLAY_FILE, Overlay
from sglp_deploy.parity.certificate import ParityReport
from sglp_deploy.plan import PruningPlan
from short_certificates import fewer_steps

KEEP = {"llama": (0, 2, 3, 5), "llama-untied": (0, 2, 3, 5), "gemma3": (0, 2, 5, 6), "gpt2": (0, 2, 3, 5)}


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer_steps(monkeypatch)


def _compressor(family: str) -> Compressor:
    module: nn.Module
    if family == "gpt2":
        module = next(specimen for specimen in zoo.specimens() if specimen.name == "gpt2").build()
    else:
        module = tiny.model(family)
    return Compressor(LoadedModel(module, tiny.tokenizer(), source_of(module, family)))


def _verify(
    made: Compressor, artifact: ExportArtifact, plan: PruningPlan | None = None, overlay: Path | None = None
) -> ParityReport:
    text = CalibrationSet.builtin_held_out(max_tokens=400, sequence_length=200)
    return made.verify(artifact, plan, overlay=overlay, text=text)


def _planned(made: Compressor, family: str, folder: Path, *names: str) -> PruningPlan:
    """A plan that changes ``names``, or every tensor there is, in a file with its overlay beside it."""
    plan = tiny.plan_for(made.model, KEEP[family]).with_overlay(overlay_of(made.model, names or None))
    plan.save(folder / "plan.json")
    plan.save_overlay(folder)
    return PruningPlan.load(folder / "plan.json")


@pytest.mark.parametrize("family", KEEP)
def test_an_artifact_with_an_overlay_is_certified_and_may_be_measured(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace is the unpruned model's own: what is laid into it must be the overlay's values."""
    made = _compressor(family)
    plan = _planned(made, family, tmp_path)
    mutations.forget_trace()
    share_traces(monkeypatch)
    made.export(made.keep_all(), "onnx", tmp_path / "baseline")
    for format_name in ("onnx", "torch", "vllm"):
        artifact = made.export(plan, format_name, tmp_path / format_name)
        assert artifact.model["overlay_file"] == str(tmp_path / OVERLAY_FILE)
        assert len(list(artifact.path.glob("*.safetensors"))) == (0 if format_name == "onnx" else 1)
        report = _verify(made, artifact)
        assert report.passed, report.reasons
        # A stand-in's certificate, as vLLM's is without its environment, counts for no measurement.
        wanted = "missing" if report.stands_in_for else "passed"
        assert certification(artifact, [report]).state == wanted
        if wanted == "passed":
            assert require_certificates({"pruned": artifact}, [report])["pruned"].passed
    mutations.forget_trace()


def test_an_artifact_made_without_the_overlay_fails_against_the_plan_that_has_one(tmp_path: Path) -> None:
    made = _compressor("llama")
    plan = _planned(made, "llama", tmp_path, "model.layers.3.mlp.up_proj.weight")
    plain = made.export(tiny.plan_for(made.model, KEEP["llama"]), "torch", tmp_path / "plain")
    report = _verify(made, replace(plain, plan_digest=plan.digest()), plan)
    assert not report.passed
    assert any("model.layers.2.mlp.up_proj.weight" in reason for reason in report.reasons), report.reasons


def test_quality_is_judged_with_the_overlay(tmp_path: Path) -> None:
    made = _compressor("llama")
    text = CalibrationSet.builtin_held_out(max_tokens=200, sequence_length=100)
    plan = _planned(made, "llama", tmp_path)
    changed, plain = made.evaluate(plan, text), made.evaluate(tiny.plan_for(made.model, KEEP["llama"]), text)
    assert changed["dense"] == plain["dense"]
    assert changed["pruned"] != plain["pruned"]


# ----------------------------------------------------------------------------------------------- where the overlay lies


def _artifact(made: Compressor, root: Path, place: str) -> ExportArtifact:
    """An artifact at ``place`` of a run folder whose overlay has not moved since."""
    plan = _planned(made, "llama", root, "model.norm.weight")
    return made.export(plan, "torch", root / place)


@pytest.mark.parametrize("place", ["artifacts/torch", "checkpoint"])
def test_a_run_folder_that_has_moved_still_has_its_overlay(place: str, tmp_path: Path) -> None:
    made = _compressor("llama")
    _artifact(made, tmp_path / "run", place)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert _verify(made, ExportArtifact.load(tmp_path / "moved" / place)).passed


def test_an_overlay_that_has_moved_is_asked_for_and_taken(tmp_path: Path) -> None:
    made = _compressor("llama")
    artifact = _artifact(made, tmp_path / "run", "artifacts/torch")
    moved = (tmp_path / "run" / OVERLAY_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(
        ArtifactError,
        match=r"the weights that the plan of .*torch changes \(digest \w{12}\) are not at hand; .*overlay\.safetensors "
        r"does not exist, and .*; name the file with --overlay \(verify\(overlay=\.\.\.\)\)",
    ):
        _verify(made, artifact)
    assert _verify(made, artifact, overlay=moved).passed
    plan = PruningPlan.load(artifact.path / "sglp_plan.json").with_weights_from(moved)
    assert _verify(made, artifact, plan).passed
    Overlay({"model.norm.weight": made.model.get_parameter("model.norm.weight")}).save(moved)
    with pytest.raises(ArtifactError, match="is not the overlay the plan names"):
        _verify(made, artifact, overlay=moved)


def test_the_right_overlay_is_found_where_a_wrong_one_lies_nearer(tmp_path: Path) -> None:
    """The recorded file may be another plan's by now, while the run folder was copied whole."""
    made = _compressor("llama")
    artifact = _artifact(made, tmp_path / "run", "artifacts/torch")
    (tmp_path / "copy").mkdir()
    shutil.copytree(artifact.path, tmp_path / "copy" / "artifacts" / "torch")
    right = tmp_path / "run" / OVERLAY_FILE
    shutil.copy(right, tmp_path / "copy" / OVERLAY_FILE)
    Overlay({"model.norm.weight": made.model.get_parameter("model.norm.weight") * 2}).save(right)
    assert _verify(made, ExportArtifact.load(tmp_path / "copy" / "artifacts" / "torch")).passed
    with pytest.raises(ArtifactError, match="is not the overlay the plan names"):
        _verify(made, artifact)


def test_an_overlay_for_a_plan_that_has_none_is_refused(tmp_path: Path) -> None:
    made = _compressor("llama")
    artifact = made.export(tiny.plan_for(made.model, KEEP["llama"]), "torch", tmp_path / "torch")
    assert "overlay_file" not in json.loads((artifact.path / "manifest.json").read_text())["model"]
    with pytest.raises(PlanError, match="the plan changes no weights"):
        _verify(made, artifact, overlay=tmp_path / OVERLAY_FILE)
