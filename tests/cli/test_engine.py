"""The engine by itself, with stages of no meaning: what is kept, what is done again, what is remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglp_deploy import _io
from sglp_deploy.cli import ledger
from sglp_deploy.cli.engine import Engine
from sglp_deploy.errors import BackendError, ConfigError


class Run:
    """One run of two stages, ``first`` and ``second``, that write a file each; ``ran`` has those that worked."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.ran: list[str] = []
        self.prepared = 0
        self.said: list[str] = []
        self.engine = Engine(
            root,
            versions=options.pop("versions", {"toy": "1"}),
            describe=lambda: {"title": "a toy"},
            prepare=self._prepare,
            note=self.said.append,
            **options,
        )

    def _prepare(self) -> None:
        self.prepared += 1

    def write(self, name: str, text: str) -> Callable[[], None]:
        def work() -> None:
            self.ran.append(name)
            _io.write_text(self.engine.root / f"{name}.txt", text)

        return work

    def go(self, first: str = "a", second: str = "b", setting: int = 1) -> list[str]:
        with self.engine.opened():
            product = self.engine.stage("first", {"n": setting}, [], ["first.txt"], self.write("first", first))
            self.engine.stage("second", {}, [product], ["second.txt"], self.write("second", second))
        return self.ran


def test_a_second_run_does_nothing_and_prepares_nothing(tmp_path: Path) -> None:
    assert Run(tmp_path / "run").go() == ["first", "second"]
    again = Run(tmp_path / "run")
    assert again.go() == []
    assert again.prepared == 0
    assert again.said == [f"{name}: kept, its inputs have not changed" for name in ("first", "second")]


@pytest.mark.parametrize(
    ("change", "ran"),
    [
        ({"setting": 2}, ["first"]),  # it comes out the same, so what depends on it stays
        ({"setting": 2, "first": "other"}, ["first", "second"]),
    ],
)
def test_what_depends_on_a_stage_follows_only_if_that_comes_out_different(
    change: dict[str, Any], ran: list[str], tmp_path: Path
) -> None:
    Run(tmp_path / "run").go()
    assert Run(tmp_path / "run").go(**change) == ran


def test_other_versions_run_everything(tmp_path: Path) -> None:
    Run(tmp_path / "run").go()
    assert Run(tmp_path / "run", versions={"toy": "2"}).go() == ["first", "second"]


def test_a_damaged_output_is_made_again(tmp_path: Path) -> None:
    Run(tmp_path / "run").go()
    (tmp_path / "run" / "second.txt").write_text("scribbled over")
    assert Run(tmp_path / "run").go() == ["second"]
    assert (tmp_path / "run" / "second.txt").read_text() == "b"


def test_an_output_may_count_by_something_else_than_its_bytes(tmp_path: Path) -> None:
    counted = {"first.txt": lambda file: file.read_text().partition(" ")[0]}
    Run(tmp_path / "run", counted_as=counted).go(first="decision 1.5 s")
    assert Run(tmp_path / "run", counted_as=counted).go(first="decision 9.9 s", setting=2) == ["first"]
    assert Run(tmp_path / "run", counted_as=counted).go(first="another 9.9 s", setting=3) == ["first", "second"]


def test_a_stage_that_fails_says_why_in_the_run_file_and_is_tried_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise BackendError("the toy broke; it was dropped; buy another")

    run = Run(tmp_path / "run")
    with run.engine.opened(), pytest.raises(BackendError):
        run.engine.stage("first", {"n": 1}, [], ["first.txt"], fail)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["title"] == "a toy"
    assert saved["stages"]["first"]["state"] == "failed"
    assert saved["stages"]["first"]["note"] == "the toy broke; it was dropped; buy another"
    assert not run.engine.done("first")
    assert Run(tmp_path / "run").go() == ["first", "second"]


def test_a_stage_that_this_run_has_not_come_to_is_not_forgotten_until_it_is_said(tmp_path: Path) -> None:
    Run(tmp_path / "run").go()
    run = Run(tmp_path / "run")
    with run.engine.opened():
        run.engine.stage("first", {"n": 2}, [], ["first.txt"], run.write("first", "a"))
        assert list(json.loads((tmp_path / "run" / "run.json").read_text())["stages"]) == ["first", "second"]
        assert run.engine.outputs() == ["first.txt"]
        run.engine.forget_others("third")
        run.engine.save()
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["stages"]) == ["first"]


def test_an_answer_is_kept_until_the_stage_or_what_decides_it_changes(tmp_path: Path) -> None:
    asked: list[int] = []

    def question(run: Run, decides: int, answer: str | None) -> str | None:
        def ask() -> str | None:
            asked.append(decides)
            return answer

        return run.engine.answer("first", {"decides": decides}, ask)

    for decides, setting, answer, expected, asked_then in (
        (1, 1, "because", "because", [1]),
        (1, 1, "never asked", "because", [1]),
        (2, 1, None, None, [1, 2]),
        (2, 1, "never asked", None, [1, 2]),
        (2, 2, "made again", "made again", [1, 2, 2]),
    ):
        run = Run(tmp_path / "run")
        run.go(setting=setting)
        assert question(run, decides, answer) == expected
        assert asked == asked_then


def test_a_run_file_of_the_first_version_is_believed(tmp_path: Path) -> None:
    Run(tmp_path / "run").go()
    file = tmp_path / "run" / "run.json"
    value = json.loads(file.read_text())
    assert value["schema"] == "run/2"
    for stage in value["stages"].values():
        del stage["answer"]  # version 1 had none
    file.write_text(json.dumps(value | {"schema": "run/1"}))
    assert Run(tmp_path / "run").go() == []


@pytest.mark.parametrize("damage", [{"outputs": 3}, {"answer": "because"}])
def test_a_stage_whose_fields_have_another_type_is_not_believed(damage: dict[str, Any], tmp_path: Path) -> None:
    Run(tmp_path / "run").go()
    file = tmp_path / "run" / "run.json"
    value = json.loads(file.read_text())
    value["stages"]["first"] |= damage
    file.write_text(json.dumps(value))
    assert Run(tmp_path / "run").go() == ["first"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        ledger.run_folder(tmp_path / "run"),
        pytest.raises(ConfigError, match=r"another run is writing to .*; two would mix their files; wait for it, or"),
    ):
        Run(tmp_path / "run").go()


def test_what_a_stage_wrote_beside_its_outputs_is_an_output_too(tmp_path: Path) -> None:
    def go(content: str) -> Run:
        run = Run(tmp_path / "run")

        def work() -> list[str]:
            run.write("first", "a")()
            _io.write_text(tmp_path / "run" / "more.txt", content)
            return ["more.txt"]

        with run.engine.opened():
            product = run.engine.stage("first", {}, [], ["first.txt"], work)
            run.engine.stage("second", {}, [product], ["second.txt"], run.write("second", "b"))
        assert "more.txt" in run.engine.outputs()
        return run

    assert go("x").ran == ["first", "second"]
    assert go("x").ran == []
    (tmp_path / "run" / "more.txt").write_text("damaged")
    assert go("x").ran == ["first"]
    (tmp_path / "run" / "more.txt").unlink()
    assert go("other").ran == ["first", "second"]


def test_a_stage_that_fails_in_a_way_nobody_foresaw_is_not_left_running(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")

    def breaks() -> None:
        raise ValueError("a plugin's own")

    with run.engine.opened():
        with pytest.raises(ValueError, match="a plugin's own"):
            run.engine.stage("breaks", {}, [], [], breaks)
        with pytest.raises(OSError, match=r"missing\.txt"):
            run.engine.stage("writes nothing", {}, [], ["missing.txt"], lambda: None)
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {"breaks": "failed", "writes nothing": "failed"}
    assert stages["breaks"]["note"] == "ValueError: a plugin's own"
