"""Weights that lie on disk are nobody's to replace or to remove but the plan's that names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglp_deploy.cli import ledger, session
from sglp_deploy.errors import ConfigError
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.planners.registry import PLANNER_GROUP


def test_a_plan_is_not_written_where_the_weights_of_another_plan_lie(tmp_path: Path) -> None:
    session.check_overlay_place(tmp_path / "plan.json")  # nothing there yet
    (tmp_path / OVERLAY_FILE).write_bytes(b"weights")
    for there in (None, {"overlay": None}, "no JSON"):
        if there is not None:
            (tmp_path / "plan.json").write_text(there if isinstance(there, str) else json.dumps(there))
        with pytest.raises(ConfigError, match="holds the weights of another plan; those of a new plan would replace"):
            session.check_overlay_place(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps({"overlay": {"digest": "a" * 64}}))
    session.check_overlay_place(tmp_path / "plan.json")  # the plan that names them is made again
    assert (tmp_path / OVERLAY_FILE).read_bytes() == b"weights"


def test_a_run_does_not_begin_in_a_folder_that_holds_somebody_s_weights(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / OVERLAY_FILE).write_bytes(b"weights")
    with (
        pytest.raises(ConfigError, match=rf"holds {OVERLAY_FILE} and no run\.json; a run would mix its files"),
        ledger.run_folder(tmp_path),
    ):
        pytest.fail("the folder was taken")
    assert (tmp_path / OVERLAY_FILE).read_bytes() == b"weights"


def test_a_name_of_ours_is_ours_whoever_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "shadow-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shadow\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{PLANNER_GROUP}]\nsglp = shadow:Planner\nother = shadow:Planner\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ledger.provider(PLANNER_GROUP, "sglp") == "built-in"
    assert ledger.provider(PLANNER_GROUP, "other") == "shadow==1.0"
