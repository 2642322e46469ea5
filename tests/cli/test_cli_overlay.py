"""Plans that change weights on the command line: where their file is found, what is said when not, and ``run``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cli_runs
from overlays import overlay_of
from sglp_deploy.artifact import ExportArtifact
from sglp_deploy.cli import session
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.models import load_model
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan

LAYER = "model.layers.3.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture
def planned(model: Path, tmp_path: Path) -> Path:
    """A folder with plan.json, which drops layers 1 and 4, and the weights it changes."""
    made = Compressor.from_pretrained(model)
    plan = made.plan_by_hand([1, 4]).with_overlay(overlay_of(made.model, [LAYER, NORM]))
    plan.save(tmp_path / "planned" / "plan.json")
    plan.save_overlay(tmp_path / "planned")
    return tmp_path / "planned"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run into an error: one line on standard error, nothing on standard output."""
    assert main([*map(str, arguments), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# ----------------------------------------------------------------------------------------------------------- the verbs


def test_materialize_takes_the_weights_beside_the_plan(model: Path, planned: Path, tmp_path: Path) -> None:
    assert main(["materialize", str(model), str(planned / "plan.json"), "-o", str(tmp_path / "small"), "-q"]) == 0
    changed, written = load_file(planned / OVERLAY_FILE), load_file(tmp_path / "small" / "model.safetensors")
    assert torch.equal(written["model.layers.2.mlp.up_proj.weight"], changed[LAYER])
    assert torch.equal(written[NORM], changed[NORM])
    right = load_file(model / "model.safetensors")
    assert torch.equal(written["model.layers.3.mlp.up_proj.weight"], right["model.layers.5.mlp.up_proj.weight"])
    assert [file.name for file in (tmp_path / "small").glob("*.safetensors")] == ["model.safetensors"]


def test_an_artifact_is_exported_and_verified_with_the_weights_wherever_they_lie(
    model: Path, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = (planned / OVERLAY_FILE).rename(tmp_path / "elsewhere")
    command = [
        "export",
        str(model),
        str(planned / "plan.json"),
        "--to",
        "torch",
        "-o",
        str(tmp_path / "made" / "torch"),
    ]
    missing = r"is not at hand; without it the model would be another one; put overlay.safetensors beside the plan, or"
    assert missing in refusal(capsys, *command)
    assert main([*command, "--overlay", str(elsewhere), "-q"]) == 0
    artifact = ExportArtifact.load(tmp_path / "made" / "torch")
    assert artifact.model["overlay_file"] == str(elsewhere)
    verify = ["verify", str(artifact.path)]
    assert main([*verify, "-q"]) == 0

    moved = elsewhere.rename(tmp_path / "moved")
    capsys.readouterr()
    assert f"{elsewhere} does not exist, and without them" in refusal(capsys, *verify)
    assert main([*verify, "--overlay", str(moved), "-q"]) == 0
    _flip(moved)
    capsys.readouterr()
    assert "is not the overlay the plan names" in refusal(capsys, *verify, "--overlay", moved)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "put overlay.safetensors beside the plan, or name it with --overlay"),
        (_flip, "it was altered or belongs to another plan; restore it, or make the plan again"),
    ],
    ids=["missing", "damaged"],
)
def test_weights_that_are_missing_or_damaged_are_refused_by_materialize(
    spoil: Callable[[Path], None],
    words: str,
    model: Path,
    planned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(planned / OVERLAY_FILE)
    assert words in refusal(capsys, "materialize", model, planned / "plan.json", "-o", tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_overlay_is_refused_where_nothing_asks_for_one(
    model: Path, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain.json"
    Compressor.from_pretrained(model).plan_by_hand([1]).save(plain)
    given = ("--overlay", planned / OVERLAY_FILE, "-o", tmp_path / "out")
    assert "the plan changes no weights" in refusal(capsys, "materialize", model, plain, *given)
    with pytest.raises(SystemExit) as end:
        main(["export", str(model), "--baseline", *map(str, given)])
    assert end.value.code == 2
    assert "--overlay goes with a plan" in capsys.readouterr().err


def _with_weights(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Plans made from now on change these weights, as a planner's do that returns some."""
    real = session.make_plan

    def make(made: Compressor, *given: Any, **named: Any) -> PruningPlan:
        plan = real(made, *given, **named)
        return plan.with_overlay(overlay_of(made.model, names)) if names else plan

    patch.setattr(session, "make_plan", make)


def test_plan_writes_the_weights_beside_the_plan(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_weights(monkeypatch, LAYER)
    file = tmp_path / "plan.json"
    assert main(["plan", str(model), "--drop", "2", *cli_runs.SMALL, "-o", str(file), "-q"]) == 0
    weights = PruningPlan.load(file).require_weights()
    assert weights is not None
    assert weights.path == tmp_path / OVERLAY_FILE
    assert torch.equal(weights.tensors[LAYER], overlay_of(load_model(model).module, [LAYER]).tensors[LAYER])
    assert "weights changed: 1 tensors" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of ``--to vllm`` whose plan changes weights."""
    cli_runs.quick(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        _with_weights(patch, LAYER, NORM)
        assert main(cli_runs.run_arguments(model, tmp_path / "run", to="vllm")) == 0
    return tmp_path / "run"


def _again(model: Path, run: Path) -> list[str]:
    """Run into ``run``; returns the stages that were not kept, in order."""
    assert main(cli_runs.run_arguments(model, run, to="vllm")) == 0
    stages = json.loads((run / "run.json").read_text())["stages"]
    return [name for name, stage in stages.items() if stage["note"] != "kept"]


ALL = ["plan", "checkpoint", "export vllm", "parity vllm", "quality", "report"]


def test_a_run_keeps_the_weights_beside_its_plan_and_certifies_what_has_them(
    run: Path, model: Path, tmp_path: Path
) -> None:
    changed = load_file(run / OVERLAY_FILE)
    assert changed.keys() == {LAYER, NORM}
    for folder in ("checkpoint", "artifacts/vllm"):
        assert torch.equal(load_file(run / folder / "model.safetensors")[NORM], changed[NORM])
    assert json.loads((run / "parity" / "vllm.json").read_text())["passed"]
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert stages["plan"]["outputs"].keys() == {"plan.json", OVERLAY_FILE}
    assert _again(model, run) == []
    # And a folder that was carried elsewhere is verified there.
    moved = shutil.move(run, tmp_path / "moved")
    assert main(["verify", f"{moved}/artifacts/vllm", "-q"]) == 0
    assert main(["verify", f"{moved}/checkpoint", "-q"]) == 0


@pytest.mark.parametrize("spoil", [Path.unlink, _flip], ids=["missing", "damaged"])
def test_weights_of_a_run_that_are_spoiled_are_made_again_and_what_came_out_the_same_is_not(
    spoil: Callable[[Path], None], run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / OVERLAY_FILE).read_bytes()
    spoil(run / OVERLAY_FILE)
    _with_weights(monkeypatch, LAYER, NORM)
    assert _again(model, run) == ["plan"]
    assert (run / OVERLAY_FILE).read_bytes() == before


def test_other_weights_run_everything_that_depends_on_the_plan(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / OVERLAY_FILE).unlink()
    _with_weights(monkeypatch, LAYER)
    assert _again(model, run) == ALL
    assert load_file(run / OVERLAY_FILE).keys() == {LAYER}


def test_weights_of_an_earlier_plan_are_removed_when_the_new_one_changes_none(run: Path, model: Path) -> None:
    (run / "plan.json").unlink()
    assert _again(model, run) == ALL
    assert not (run / OVERLAY_FILE).exists()
    assert _again(model, run) == []
