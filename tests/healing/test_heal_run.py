"""``run`` with healing: its stage, its folders, the four figures of quality, and a run that is killed meanwhile.

Held-out losses are planted, but where bytes are compared.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli_runs
from cli_runs import killed_and_resumed
from sglp_deploy.cli import ledger
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.healing import healed
from sglp_deploy.healing.state import Keeper
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan
from sglp_deploy.repairs.workbench import Workbench

REPAIR = ("--repair", "scale", "--repair-tokens", "1024")
HEAL = ("--heal-tokens", "4K", "--heal-text", "builtin", "--option", "heal.sequence_length=32")
HEAL = (*HEAL, "--option", "heal.held_out=128", "--option", "heal.precision=fp32")
ALL = ["plan", "repair", "heal", "checkpoint", "export vllm", "parity vllm", "quality", "report"]


def plant(patch: pytest.MonkeyPatch, after: float = 2.0) -> None:
    """A repair that helps, and healing with this loss after it; it is 3 before."""

    def loss(bench: Workbench, module: Any) -> float:
        return 1.0 if module.config.num_hidden_layers == 6 else 3.0 if bench.changed else 4.0

    patch.setattr(Workbench, "loss", loss)
    order = iter([1.0, 3.0, after] * 99)  # as they are asked for, in one healing after another
    patch.setattr(healed, "nats", lambda _speaker, rows, **_: np.full(len(rows), next(order) * (rows.shape[1] - 1)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _planted_times(monkeypatch: pytest.MonkeyPatch) -> None:
    cli_runs.quick(monkeypatch)


def stages(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text())["stages"])


def again(model: Path, run: Path, *more: str) -> list[str]:
    """Run into ``run``; returns the stages that were not kept, in order."""
    assert main(cli_runs.run_arguments(model, run, *more, to="vllm")) == 0
    return [name for name, stage in stages(run).items() if stage["note"] != "kept"]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a repair and healing that helped; not to be changed."""
    run = tmp_path_factory.mktemp("healed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        cli_runs.quick(patch)
        plant(patch)
        assert main(cli_runs.run_arguments(model, run, *REPAIR, *HEAL, to="vllm")) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_keeps_the_plan_the_repaired_and_the_healed_one(run: Path) -> None:
    assert list(stages(run)) == ALL
    files = [run / ledger.DECIDED, run / ledger.REPAIRED, run / "plan.json"]
    planned, repaired, healed_plan = map(PruningPlan.load, files)
    assert planned.overlay is None
    assert repaired.overlay is not None
    assert healed_plan.overlay is not None
    assert [record["repair"] for record in repaired.overlay["made_by"]] == ["scale"]
    assert [record["repair"] for record in healed_plan.overlay["made_by"]] == ["scale", "heal"]
    assert stages(run)["repair"]["outputs"].keys() == {"repaired/plan.json", f"repaired/{OVERLAY_FILE}"}
    assert stages(run)["heal"]["outputs"].keys() == {"plan.json", OVERLAY_FILE}
    assert not (run / "healing").exists()
    assert json.loads((run / "parity" / "vllm.json").read_text())["passed"]


def test_quality_has_four_models_and_every_output_shows_them(
    run: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = json.loads((run / "quality.json").read_text())
    assert (quality["schema"], quality["repairs"]) == ("quality/3", ["scale", "heal"])
    figures = [quality[name]["perplexity"] for name in ("dense", "unrepaired", "repaired", "pruned")]
    assert len(set(figures)) == 4
    text = CalibrationSet.builtin_held_out(max_tokens=256, sequence_length=32)
    compressor = Compressor.from_pretrained(model)
    for name, file in (("unrepaired", ledger.DECIDED), ("repaired", ledger.REPAIRED)):
        expected = compressor.evaluate(PruningPlan.load(run / file), text)
        assert quality[name]["nats_by_row"] == pytest.approx(expected["pruned"]["nats_by_row"])
        assert quality[name]["ratio"] == pytest.approx(expected["ratio"])
    assert again(model, run, *REPAIR, *HEAL) == []
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    dense, raw, repaired, last = (f"{figure:.2f}" for figure in figures)
    assert rows["perplexity"].strip() == f"{dense} -> {last} (before repair {raw}, repaired {repaired})"
    assert (
        rows["repair"].strip().endswith("heal: kept; held-out loss 1.0000 dense, 3.0000 before healing, 2.0000 after")
    )
    assert main(["show", str(run / "quality.json")]) == 0
    shown = capsys.readouterr().out.splitlines()[2:6]
    assert [line.split("  ")[0] for line in shown] == [
        "dense", "pruned, before repair", "pruned, repaired", "pruned, healed",
    ]  # fmt: skip
    assert "Before repair, repaired, healed" in (run / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "ran"), [(OVERLAY_FILE, "heal"), ("plan.json", "heal"), (f"repaired/{OVERLAY_FILE}", "repair")]
)
def test_what_is_spoiled_is_made_again_and_what_came_out_the_same_is_not(
    file: str, ran: str, run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    before = (run / OVERLAY_FILE).read_bytes()
    (run / file).unlink()
    assert again(model, run, *REPAIR, *HEAL) == [ran]
    assert (run / OVERLAY_FILE).read_bytes() == before


def test_other_settings_heal_again_and_none_leave_nothing_of_it(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert again(model, run, *REPAIR, *HEAL, "--heal-tokens", "5K") == ALL[2:]
    (run / "healing").mkdir()
    (run / "healing" / "state.safetensors").write_bytes(b"of a run that was killed")
    assert again(model, run, *REPAIR) == [name for name in ALL[1:] if name != "heal"]
    assert not (run / "healing").exists()
    assert not (run / "repaired").exists()
    assert "repaired" not in json.loads((run / "quality.json").read_text())
    assert list(stages(run)) == [name for name in ALL if name != "heal"]


def test_without_a_repair_it_heals_the_plan_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    run = tmp_path / "run"
    assert again(model, run, *HEAL) == [name for name in ALL if name != "repair"]
    quality = json.loads((run / "quality.json").read_text())
    assert quality["repairs"] == ["heal"]
    assert "unrepaired" in quality
    assert "repaired" not in quality
    assert "before healing and" in (run / "report" / "report.html").read_text()


def test_healing_that_does_not_help_is_warned_of_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, after=3.5)
    run = tmp_path / "run"
    assert again(model, run, *REPAIR, *HEAL) == ALL
    out, err = capsys.readouterr()
    why = "the loss on held-out rows does not become lower (3.0000 to 3.5000)"
    assert err == f"warning: the plan is not healed; {why}; the run goes on\n"
    assert f"heal: refused, because {why}" in out
    assert (run / OVERLAY_FILE).read_bytes() == (run / "repaired" / OVERLAY_FILE).read_bytes()
    assert "repaired" not in json.loads((run / "quality.json").read_text())
    assert again(model, run, *REPAIR, *HEAL) == []


def test_text_that_is_too_short_for_healing_stops_a_run_that_asks_for_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch)
    text = tmp_path / "short.txt"
    text.write_text("The cat sat.")
    arguments = cli_runs.run_arguments(model, tmp_path / "run", *HEAL, "--heal-text", str(text), to="vllm")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "short.txt gives 13 tokens, which fill 0 rows of 32; healing trains on some rows" in err
    assert stages(tmp_path / "run")["heal"]["state"] == "failed"


def test_a_plan_that_removes_nothing_is_not_healed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compressor, "heal", lambda *_, **__: pytest.fail("there is nothing to heal"))
    run = tmp_path / "run"
    assert main(cli_runs.run_arguments(model, run, *HEAL, to="vllm", drop="0")) == 0
    assert PruningPlan.load(run / "plan.json").drop == ()


def test_the_state_lies_in_the_run_folder_while_it_lasts_and_another_run_finds_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "due", True)
    write, steps = Keeper.write, list[int]()

    def broken(keeper: Keeper, standing: Any, tensors: Any) -> None:
        write(keeper, standing, tensors)
        steps.append(standing.step)
        if len(steps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "write", broken)
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = cli_runs.run_arguments(model, run, *HEAL, "--option", "heal.batch_size=8", to="vllm")
    assert main(arguments) == 130
    assert len([*(run / "healing").glob("*.safetensors")]) == 1
    assert main(arguments) == 0
    assert steps == [1, 2, 3, 4, *range(5, 17)]
    assert not (run / "healing").exists()
    assert main([*arguments, "-o", str(whole)]) == 0
    assert (run / OVERLAY_FILE).read_bytes() == (whole / OVERLAY_FILE).read_bytes()


@pytest.mark.slow
def test_killed_at_twenty_random_points_a_run_with_repair_and_healing_makes_the_same_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    more = ("--repair", "refit", "--repair-tokens", "2048", *HEAL, "--heal-tokens", "60K")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(cli_runs.run_arguments(model, whole, *more, to="torch")) == 0
    rng = random.Random(0)
    delays = [rng.uniform(0, 3) for _ in range(20)]
    arguments = cli_runs.run_arguments(model, broken, *more, to="torch")
    assert killed_and_resumed(arguments, broken, delays) >= 5
    for name in ("model.safetensors", "config.json"):
        assert (broken / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes()
    assert (broken / OVERLAY_FILE).read_bytes() == (whole / OVERLAY_FILE).read_bytes()


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heal_tokens": 0}, "tokens=0 is no budget; nothing would be trained"),
        ({"heal_minutes": 0}, r"minutes=0\.0 is no budget; nothing would be trained"),
        (
            {"heal_text": ("builtin",)},
            r"heal_text is given and healing has no budget; nothing would read it; add minut",
        ),
        ({"heal_options": {"ce": 0.5}}, "heal_options is given and healing has no budget; nothing would read it"),
        ({"heal_tokens": 1, "heal_options": {"c": 0.5}}, "unknown option of healing 'c'; .*did you mean 'ce'"),
        ({"heal_minutes": "long"}, "heal_minutes='long' is of the wrong kind"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(model="m", drop=1, **settings)


def test_file_and_flags_are_put_together(tmp_path: Path) -> None:
    file = tmp_path / "sglp.toml"
    file.write_text(
        "model.path = 'm'\nplan.drop = 1\nrun.seed = 3\n[heal]\nminutes = 15\ntext = ['written']\noptions.ce = 0.5\n"
    )
    config = RunConfig.load(file, heal_options={"lora": "4"})
    assert (config.heals, config.heal_text) == (True, ("written",))
    options = config.healing()
    assert (options.minutes, options.tokens, options.ce, options.lora, options.seed) == (15.0, None, 0.5, 4, 3)
    assert RunConfig.load(file, heal_minutes=15.0).healing() == RunConfig.load(file).healing()
    assert not RunConfig(model="m", drop=1).heals
