"""A third party's planner that measures again after each removal: installed by pip, used by name, with its option."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli_runs
from installing import pip_install
from sglp_bench import Comparison
from sglp_deploy import Compressor, ParityReport
from sglp_deploy.cli import pipeline
from sglp_deploy.cli.main import main
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.plan import PruningPlan

EXAMPLE = Path(__file__).parents[1] / "examples" / "planner_example"
EXPORTER = Path(__file__).parents[1] / "examples" / "plugin_example"
MODULE = "sglp_greedy_loss"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The installed package, importable."""
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed} in this environment")
    here = tmp_path_factory.mktemp("planner")
    shutil.copytree(EXAMPLE, here / EXAMPLE.name)  # pip builds inside the source folder
    pip_install(here / EXAMPLE.name, here / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(here / "site"))
        yield here / "site"
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


def plan(model: Path, folder: Path, *more: str) -> PruningPlan:
    arguments = ["plan", str(model), "--method", "greedy-loss", *cli_runs.SMALL, "-q", "-o", str(folder / "plan.json")]
    assert main([*arguments, *more]) == 0
    return PruningPlan.load(folder / "plan.json")


def test_the_example_is_as_short_as_the_page_says() -> None:
    assert len((EXAMPLE / f"{MODULE}.py").read_text(encoding="utf-8").splitlines()) <= 60


def test_it_removes_what_costs_least_measured_again_after_each_removal(site: Path, model: Path, tmp_path: Path) -> None:
    del site
    made = plan(model, tmp_path, "--drop", "2")
    assert (made.method, made.criterion, made.task) == ("greedy-loss", "loss-without", "language")
    assert made.options["protect_ends"] == 1
    text = CalibrationSet.builtin(max_tokens=256, sequence_length=32)
    evidence = Compressor.from_pretrained(model, calibration=text).evidence()
    first = min(range(1, 5), key=lambda layer: (evidence.loss_without((layer,)), -layer))
    rest = [layer for layer in range(1, 5) if layer != first]
    second = min(rest, key=lambda layer: (evidence.loss_without((first, layer)), -layer))
    assert made.drop == tuple(sorted((first, second)))
    assert made.scores["loss-without"] == pytest.approx([evidence.loss_without((layer,)) for layer in range(6)])


def test_its_option_is_given_on_the_command_line(site: Path, model: Path, tmp_path: Path) -> None:
    del site
    made = plan(model, tmp_path, "--drop", "2", "--option", "protect_ends=2")
    assert made.drop == (2, 3)
    assert made.options["protect_ends"] == 2


def test_a_wrong_option_gets_the_nearest_match_before_anything_is_loaded(
    site: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del site
    arguments = ["plan", str(model), "--method", "greedy-loss", "--drop", "2", "-o", str(tmp_path / "plan.json")]
    assert main([*arguments, "--option", "protect_end=2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: unknown option of planner 'greedy-loss' 'protect_end'; ")
    assert "did you mean 'protect_ends'" in said
    assert not (tmp_path / "plan.json").exists()


def test_a_run_plans_with_it(site: Path, model: Path, tmp_path: Path) -> None:
    del site
    arguments = cli_runs.run_arguments(model, tmp_path / "run", "--method", "greedy-loss", to="vllm")
    assert main([*arguments, "--option", "plan.protect_ends=2"]) == 0
    value = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert (value["drop"], value["method"]) == ([2, 3], "greedy-loss")


@pytest.mark.slow
def test_a_run_plans_with_a_third_party_s_planner_and_measures_a_third_party_s_exporter(
    site: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "run_arms", cli_runs.fake_run_arms)  # blocks in processes of their own take minutes
    shutil.copytree(EXPORTER, tmp_path / EXPORTER.name)
    pip_install(tmp_path / EXPORTER.name, site)
    importlib.invalidate_caches()
    arguments = cli_runs.run_arguments(model, tmp_path / "run", "--method", "greedy-loss", to="torch-export")
    assert main([*arguments, "--option", "plan.protect_ends=2"]) == 0
    assert PruningPlan.load(tmp_path / "run" / "plan.json").drop == (2, 3)
    for name in ("torch-export", "torch-export-baseline"):
        assert ParityReport.load(tmp_path / "run" / "parity" / f"{name}.json").passed
    comparison = Comparison.load(tmp_path / "run" / "bench" / "torch-export" / "comparison.json")
    assert {arm["artifact"]["format"] for arm in comparison.arms.values()} == {"torch-export"}
    assert {"prefill_latency_s", "decode_latency_s_per_token"} <= comparison.metrics.keys()
