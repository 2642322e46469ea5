"""Two processes take the steps of one process with the same rows, to rounding; one of them writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cli_runs
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.errors import ConfigError
from sglp_deploy.healing.launch import own_device, started_together
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


_OF_EACH = r"""
import os, sys
from sglp_deploy.healing.training import Training
step = Training._step
def summed(own, draws, rate):
    step(own, draws, rate)
    mine = len(draws[own.team.rank :: own.team.size])
    os.write(1, f"rows {own.team.rank} {mine} {own.tokens_per_step}\n".encode())  # whole, whoever else writes
Training._step = summed
from sglp_deploy.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_make_the_weights_of_one_with_the_same_rows(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "planned" / "plan.json"
    Compressor.from_pretrained(model).plan_by_hand([1, 4]).save(plan)
    given = ["heal", str(model), str(plan), "--tokens", "2K", "--sequence-length", "32", "--threads", "1", "-q"]
    given += ["--text", "builtin", "--option", "held_out=256", "--option", "precision=fp32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*given, "--batch-size", "8", "-o", str(one)]) == 0
    script = tmp_path / "heal.py"
    script.write_text(_OF_EACH)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
            *given, "--batch-size", "4", "-o", str(two),
        ],
        env=cli_runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted({line for line in lines if line.startswith("rows")}) == ["rows 0 4 256", "rows 1 4 256"]
    assert len([line for line in lines if line.startswith("written to")]) == 1
    expected, found = load_file(one / OVERLAY_FILE), load_file(two / OVERLAY_FILE)
    start = dict(Compressor.from_pretrained(model).model.named_parameters())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        moved = float((value - start[name].detach()).abs().max())
        assert float((found[name] - value).abs().max()) < 0.02 * moved, name
    plans = [PruningPlan.load(folder / "plan.json") for folder in (one, two)]
    records = [made.overlay["made_by"][0] for made in plans if made.overlay is not None]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["loss_after"] == pytest.approx(records[1]["loss_after"], rel=1e-3)


def test_a_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (started_together(), own_device("cuda"), own_device("cpu")) == ((0, 1), "cuda", "cpu")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert (started_together(), own_device("cuda"), own_device("cuda:0")) == ((3, 4), "cuda:1", "cuda:0")
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK=4 is outside WORLD_SIZE=4; a process is missing; start them with"):
        started_together()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"RANK and WORLD_SIZE are no numbers; .*; start the processes with torchrun"):
        started_together()


def test_a_whole_run_is_not_started_several_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(cli_runs.run_arguments(model, tmp_path / "run")) == 1
    assert "run was started as 2 processes; they would write into one folder; start heal" in capsys.readouterr().err
    assert torch.get_num_threads() == 1
