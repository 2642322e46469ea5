"""``repair`` and the stage of that name in ``run``: what is written, what is said, and what is refused.

Held-out losses are planted.  Whether a repair of random weights helps is chance, and not what is tested here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cli_runs
import tiny
from overlays import overlay_of
from sglp_deploy.cli import session
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.main import main
from sglp_deploy.cli.settings import NO_REPAIR, SETTINGS
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ConfigError, UnsupportedModelError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan
from sglp_deploy.repairs.registry import REPAIRS
from sglp_deploy.repairs.workbench import Workbench

FEW = ("--calibration-tokens", "1024", "--sequence-length", "32", "--threads", "1")
HELPS, HARMS = 3.5, 4.5  # the planted loss after the repair; it is 3 of the unpruned model and 4 before the repair
RUN = ("--repair", "refit", "--repair-tokens", "1024")


def plant(patch: pytest.MonkeyPatch, after: float) -> None:
    def loss(bench: Workbench, module: Any) -> float:
        if module.config.num_hidden_layers == 6:
            return 3.0
        return after if bench.changed else 4.0

    patch.setattr(Workbench, "loss", loss)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> Path:
    """A plan that drops layers 1 and 4."""
    file = tmp_path / "planned" / "plan.json"
    Compressor.from_pretrained(model).plan_by_hand([1, 4]).save(file)
    return file


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run into an error: one line on standard error with its three parts, nothing on standard output."""
    assert main([*map(str, arguments), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.count(";") >= 2, err
    return err


# ------------------------------------------------------------------------------------------------------------ the verb


def test_a_repair_that_helps_is_written_beside_its_plan_and_said_in_words(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, HELPS)
    before, out = plan.read_bytes(), tmp_path / "out"
    assert main(["repair", str(model), str(plan), *FEW, "-o", str(out), "-q", "--json"]) == 0
    *words, last = capsys.readouterr().out.splitlines()
    assert words[0] == "repair refit: kept; held-out loss 3.0000 dense, 4.0000 before the repair, 3.5000 after"
    assert words[-1] == f"written to {out / 'plan.json'} and {out / OVERLAY_FILE}"
    assert json.loads(last) == json.loads((out / "plan.json").read_text())
    assert plan.read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [OVERLAY_FILE, "plan.json"]
    repaired = PruningPlan.load(out / "plan.json")
    assert repaired.drop == (1, 4)
    assert repaired.overlay is not None
    (record,) = repaired.overlay["made_by"]
    assert (record["repair"], record["loss_after"], record["options"]["attention"]) == ("refit", HELPS, True)

    assert main(["materialize", str(model), str(out / "plan.json"), "-o", str(tmp_path / "small"), "-q"]) == 0
    dense = load_file(model / "model.safetensors")
    changed, written = load_file(out / OVERLAY_FILE), load_file(tmp_path / "small" / "model.safetensors")
    assert changed.keys() <= dense.keys()
    assert all(not torch.equal(changed[name], dense[name]) for name in changed)
    place = "model.layers.0.mlp.down_proj.weight"  # before the first gap, so its number stays
    assert torch.equal(written[place], changed[place])


def test_what_a_repair_left_as_it_was_is_said(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: Any) -> Any:
        raise UnsupportedModelError("a layer of no known form; nothing can be folded into it; use the plan as it is")

    plant(monkeypatch, HELPS)
    monkeypatch.setattr(Workbench, "branches", unknown)
    assert main(["repair", str(model), str(plan), *FEW, "-o", str(tmp_path / "out"), "-q"]) == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert first.startswith("repair refit: refused, because layer 0: a layer of no known form; ")
    assert first.endswith("held-out loss 3.0000 dense, 4.0000 before the repair, 4.0000 after")
    assert [line.partition(": a layer")[0] for line in more[:-1]] == ["not done: layer 0", "not done: layer 3"]
    assert more[-1] == f"written to {tmp_path / 'out' / 'plan.json'}"


def test_a_repair_that_does_not_help_is_refused_in_words_and_in_the_plan(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["repair", str(model), str(plan), *FEW, "--method", "linear", "-o", str(out), "-q"]
    plant(monkeypatch, HELPS)
    assert main(arguments) == 0
    assert (out / OVERLAY_FILE).is_file()
    capsys.readouterr()
    plant(monkeypatch, HARMS)
    assert main(arguments) == 0
    words = capsys.readouterr().out.splitlines()
    assert words == [
        "repair linear: refused, because the loss on held-out rows does not become lower (4.0000 to 4.5000); held-out "
        "loss 3.0000 dense, 4.0000 before the repair, 4.5000 after",
        f"written to {out / 'plan.json'}",
    ]
    assert [path.name for path in out.iterdir()] == ["plan.json"]  # the weights of the plan it replaced are gone
    refused = PruningPlan.load(out / "plan.json")
    assert refused.overlay is None
    assert refused.compensation is not None
    assert [item["repair"] for item in refused.compensation["refused"]] == ["linear"]
    assert "does not become lower" in refused.compensation["refused"][0]["why"]


def test_show_names_the_repairs_of_a_plan_with_their_losses(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    plant(monkeypatch, HELPS)
    assert main(["repair", str(model), str(plan), *FEW, "-o", str(once), "-q"]) == 0
    plant(monkeypatch, HARMS)
    again = ["repair", str(model), str(once / "plan.json"), *FEW, "--method", "scale", "-o", str(twice), "-q"]
    assert main(again) == 0
    capsys.readouterr()
    assert main(["show", str(twice / "plan.json")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("repair ")]
    assert lines[0] == "repair refit: kept; held-out loss 3.0000 dense, 4.0000 before the repair, 3.5000 after"
    assert lines[1].startswith("repair scale: refused, because the loss on held-out rows does not become lower")
    assert len(lines) == 2
    assert load_file(twice / OVERLAY_FILE).keys() == load_file(once / OVERLAY_FILE).keys()


def _of_another_model(plan: Path, out: Path) -> list[str]:
    other = tiny.save_tiny(plan.parent.parent / "other", seed=5)
    Compressor.from_pretrained(other).plan_by_hand([1, 4]).save(plan)
    return []


def _of_nothing(plan: Path, out: Path) -> list[str]:
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"keep": list(range(6)), "drop": []}))
    return []


def _short_text(plan: Path, out: Path) -> list[str]:
    text = plan.parent / "short.txt"
    text.write_text("The cat sat on the mat, and the dog did not mind it at all.")
    return ["--calibration", str(text)]


def _a_file(plan: Path, out: Path) -> list[str]:
    out.write_text("mine")
    return []


def _a_run(plan: Path, out: Path) -> list[str]:
    out.mkdir()
    (out / "run.json").write_text("{}")
    return []


def _weights_of_another_plan(plan: Path, out: Path) -> list[str]:
    out.mkdir()
    (out / OVERLAY_FILE).write_bytes(b"weights")
    return []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_of_another_model, "and not for the given model"),
        (_of_nothing, "the plan removes no layer; there is nothing to repair"),
        (_short_text, "a repair is fitted on some and judged on others"),
        (_a_file, "is a file; a folder for plan.json is written there; choose another --output"),
        (_a_run, "is the folder of a run; its plan would be replaced; choose another --output"),
        (_weights_of_another_plan, "holds the weights of another plan"),
        (lambda *_: ["--method", "refitt"], "unknown repair 'refitt'; nothing is registered under that name; did you"),
        (lambda *_: ["--option", "ridges=1"], "unknown option of repair 'refit' 'ridges'; .*did you mean 'ridge'"),
        (lambda *_: ["--option", "ridge=wide"], "ridge='wide' does not fit repair 'refit'; "),
        (lambda *_: ["--calibration", "/nowhere/text.txt"], "/nowhere/text.txt cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    spoil: Callable[[Path, Path], list[str]],
    words: str,
    model: Path,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    more = spoil(plan, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refusal(capsys, "repair", model, plan, *FEW, *more, "-o", out)
    assert re.search(words, message), message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_plan_that_is_repaired_is_not_replaced(model: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "repair", model, plan, *FEW, "-o", plan.parent)
    assert "is the plan that is repaired; it would be replaced; choose another --output" in message
    assert [path.name for path in plan.parent.iterdir()] == ["plan.json"]


# ------------------------------------------------------------------------------------------------------------- the run

ALL = ["plan", "repair", "checkpoint", "export vllm", "parity vllm", "quality", "report"]


@pytest.fixture(autouse=True)
def _planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def again(model: Path, run: Path, *more: str) -> list[str]:
    """Run into ``run``; returns the stages that were not kept, in order."""
    assert main(cli_runs.run_arguments(model, run, *RUN, *more, to="vllm")) == 0
    return [name for name, stage in stages(run).items() if stage["note"] != "kept"]


def stages(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text())["stages"])


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``--to vllm`` with a repair that helped; not to be changed."""
    run = tmp_path_factory.mktemp("repaired") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cli_runs.quick(patch)
        plant(patch, HELPS)
        assert main(cli_runs.run_arguments(model, run, *RUN, to="vllm")) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_repairs_its_plan_and_makes_everything_of_the_repaired_one(run: Path, model: Path) -> None:
    assert list(stages(run)) == ALL
    assert [path.name for path in (run / "decision").iterdir()] == ["plan.json"]
    planned, repaired = PruningPlan.load(run / "decision" / "plan.json"), PruningPlan.load(run / "plan.json")
    assert planned.overlay is None
    assert repaired.overlay is not None
    assert repaired.drop == planned.drop
    assert stages(run)["plan"]["outputs"].keys() == {"decision/plan.json"}
    assert stages(run)["repair"]["outputs"].keys() == {"plan.json", OVERLAY_FILE}
    changed = load_file(run / OVERLAY_FILE)
    for folder in ("checkpoint", "artifacts/vllm"):
        held = load_file(run / folder / "model.safetensors").values()
        assert all(any(torch.equal(tensor, other) for other in held) for tensor in changed.values())
    assert json.loads((run / "parity" / "vllm.json").read_text())["passed"]
    assert repaired.overlay["made_by"][0]["calibration"]["n_tokens"] <= 1024


def test_quality_has_the_model_before_its_repair_and_every_output_shows_the_three(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = json.loads((run / "quality.json").read_text())
    assert quality["schema"] == "quality/3"
    text = CalibrationSet.builtin_held_out(max_tokens=256, sequence_length=32)
    expected = Compressor.from_pretrained(model).evaluate(PruningPlan.load(run / "decision" / "plan.json"), text)
    before = quality["unrepaired"]
    assert before["nats_by_row"] == pytest.approx(expected["pruned"]["nats_by_row"])
    assert (before["ratio"], before["ratio_interval"]) == (
        pytest.approx(expected["ratio"]),
        pytest.approx(expected["ratio_interval"]),
    )
    assert before["perplexity"] != quality["pruned"]["perplexity"]
    assert "unrepaired" not in expected

    assert again(model, run) == []
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    dense, pruned = quality["dense"]["perplexity"], quality["pruned"]["perplexity"]
    assert rows["perplexity"].strip() == f"{dense:.2f} -> {pruned:.2f} (before repair {before['perplexity']:.2f})"
    losses = "held-out loss 3.0000 dense, 4.0000 before the repair, 3.5000 after"
    assert rows["repair"].strip() == f"refit: kept; {losses}"
    assert main(["show", str(run / "quality.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[2:5]] == ["dense", "pruned, before repair", "pruned, repaired"]
    page = (run / "report" / "report.html").read_text()
    assert "Before and after the repair" in page


def test_a_second_run_keeps_the_repair_and_loads_no_torch(run: Path, model: Path) -> None:
    arguments = cli_runs.run_arguments(model, run, *RUN, to="vllm")
    code = (
        "import sys\nfrom sglp_deploy.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "sys.exit('torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=cli_runs.environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {stage["note"] for stage in stages(run).values()} == {"kept"}


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("spoil", [Path.unlink, _flip], ids=["missing", "damaged"])
@pytest.mark.parametrize(
    ("file", "ran"), [(OVERLAY_FILE, "repair"), ("plan.json", "repair"), ("decision/plan.json", "plan")]
)
def test_what_is_spoiled_is_made_again_and_what_came_out_the_same_is_not(
    spoil: Callable[[Path], None], file: str, ran: str, run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, HELPS)
    before = (run / OVERLAY_FILE).read_bytes()
    spoil(run / file)
    assert again(model, run) == [ran]
    assert (run / OVERLAY_FILE).read_bytes() == before


def test_another_repair_keeps_the_plan_and_none_leaves_nothing_of_it(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, HELPS)
    decided = (run / "decision" / "plan.json").read_bytes()
    assert again(model, run, "--repair", "linear") == ALL[1:]
    assert again(model, run, "--repair", "linear", "--option", "repair.ridge=0.5")[0] == "repair"
    assert (run / "decision" / "plan.json").read_bytes() == decided
    plan = PruningPlan.load(run / "plan.json")
    assert plan.overlay is not None
    assert plan.overlay["made_by"][0]["options"] == {"ridge": 0.5, "precision": "auto"}
    assert again(model, run, "--repair", "none") == [name for name in ALL if name != "repair"]
    assert not (run / "decision").exists()
    assert not (run / OVERLAY_FILE).exists()
    assert PruningPlan.load(run / "plan.json").overlay is None
    assert "unrepaired" not in json.loads((run / "quality.json").read_text())
    assert list(stages(run)) == [name for name in ALL if name != "repair"]


def test_a_refused_repair_is_warned_of_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, HARMS)
    run = tmp_path / "run"
    assert again(model, run) == ALL
    out, err = capsys.readouterr()
    why = "the loss on held-out rows does not become lower (4.0000 to 4.5000)"
    assert err == f"warning: the plan is not repaired; refit was refused: {why}; the run goes on\n"
    assert f"refit: refused, because {why}" in out
    assert not (run / OVERLAY_FILE).exists()
    plan = PruningPlan.load(run / "plan.json")
    assert replace(plan, compensation=None).digest() == PruningPlan.load(run / "decision" / "plan.json").digest()
    assert "unrepaired" not in json.loads((run / "quality.json").read_text())
    assert f"The repair refit was not used: {why}." in (run / "report" / "report.html").read_text()
    assert again(model, run) == []


def test_text_that_is_too_short_for_a_repair_alone_does_not_stop_a_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert again(model, run, "--repair-tokens", "64") == ALL
    out, err = capsys.readouterr()
    assert err.startswith("warning: the plan is not repaired; refit was refused: the calibration set gives 1 minibatch")
    assert "nothing was fitted" in out
    plan = PruningPlan.load(run / "plan.json")
    assert plan.compensation is not None
    assert plan.compensation["refused"][0].keys() == {"repair", "why"}
    assert main(["show", str(run / "plan.json")]) == 0


def test_a_plan_that_removes_nothing_is_not_repaired(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is nothing to repair")

    monkeypatch.setattr(Compressor, "repair", forbidden)
    run = tmp_path / "run"
    assert main(cli_runs.run_arguments(model, run, *RUN, to="vllm", drop="0")) == 0
    assert PruningPlan.load(run / "plan.json").digest() == PruningPlan.load(run / "decision" / "plan.json").digest()
    assert PruningPlan.load(run / "plan.json").drop == ()


def test_weights_of_a_planner_lie_beside_its_plan_and_the_repair_builds_on_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name, run = session.make_plan, "model.norm.weight", tmp_path / "run"

    def with_weights(made: Compressor, *given: Any, **named: Any) -> PruningPlan:
        return real(made, *given, **named).with_overlay(overlay_of(made.model, [name]))

    monkeypatch.setattr(session, "make_plan", with_weights)
    plant(monkeypatch, HELPS)
    assert again(model, run) == ALL
    assert stages(run)["plan"]["outputs"].keys() == {"decision/plan.json", f"decision/{OVERLAY_FILE}"}
    theirs, ours = load_file(run / "decision" / OVERLAY_FILE), load_file(run / OVERLAY_FILE)
    assert theirs.keys() == {name}
    assert torch.equal(ours[name], theirs[name])
    assert len(ours) > 1
    # Without the overlay it would be neither the planner's model nor the repaired one.
    assert "unrepaired" not in json.loads((run / "quality.json").read_text())
    assert again(model, run) == []


# ------------------------------------------------------------------------------------------------------------ settings


def test_help_names_every_repair() -> None:
    for name in (*REPAIRS, NO_REPAIR):
        assert name in SETTINGS["repair"].text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"repair": "refitt"},
            r"unknown repair 'refitt'; .*did you mean 'refit'\? .* linear, local, none, refit, scale",
        ),
        ({"repair_options": {"ridges": 1}}, "unknown option of repair 'refit' 'ridges'"),
        ({"repair": "none", "repair_options": {"ridge": 1}}, "options are given for the repair, which is 'none'; "),
        ({"repair_tokens": 1}, "repair_tokens=1 is too small; nothing could be computed; pass 8 or more"),
    ],
)
def test_settings_of_a_repair_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(model="m", drop=1, **settings)


def test_options_of_the_file_s_repair_are_not_read_for_another_one(tmp_path: Path) -> None:
    file = tmp_path / "sglp.toml"
    file.write_text("model.path = 'm'\nplan.drop = 1\n[repair]\nmethod = 'local'\noptions.epochs = 3\n")
    assert RunConfig.load(file).repair_options == {"epochs": 3}
    assert RunConfig.load(file, repair_options={"window": "1"}).repair_options == {"epochs": 3, "window": 1}
    assert RunConfig.load(file, repair="none").repair_options == {}
    assert RunConfig.load(file, repair="refit", repair_options={"later": "true"}).repair_options == {"later": True}
