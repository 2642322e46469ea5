"""The exit codes stand in one place, and the manual says the same."""

from __future__ import annotations

import re

import cli_runs
from sglp_deploy.cli.exits import Exit


def test_the_manual_lists_every_exit_code() -> None:
    manual = (cli_runs.ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", manual, re.MULTILINE) == [str(int(code)) for code in Exit]


def test_no_other_module_of_the_command_line_spells_a_code() -> None:
    for file in (cli_runs.ROOT / "sglp_deploy" / "cli").glob("*.py"):
        found = re.findall(r"EXIT_\w+|exit_code = \d|return \d+$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{file.name}: {found}"
