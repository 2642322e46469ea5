"""The flags: every one is in the manual as help has it, old ones say where they went, and help is quick."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

import cli_runs
from sglp_deploy.cli.main import VERBS, build_parser, main

COMMON = ("help", "verbose", "quiet", "json")


def verbs() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    found = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One line of the manual's table, from what the parser knows."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if not action.option_strings:
        name = f"[{value}]" if action.nargs == "?" else value
    else:
        name = f"{', '.join(action.option_strings)} {value}".rstrip()
    meaning = parser._get_formatter()._expand_help(action)
    if action.choices:
        meaning += f"; one of {', '.join(map(str, action.choices))}"
    if action.option_strings and action.required:
        meaning += " (required)"
    return f"| `{name}` | {meaning.lstrip('; ')} |"


def rows(parser: argparse.ArgumentParser, *, common: bool) -> Iterator[str]:
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and (action.dest in COMMON) == common:
            yield row(parser, action)


def chapter() -> str:
    """What the manual must say of the verbs."""
    parsers = verbs()
    lines = [
        "Every verb takes these:",
        "",
        "| flag | meaning |",
        "|---|---|",
        *rows(parsers["doctor"], common=True),
        "",
    ]
    for name, text in VERBS.items():
        lines += [f"### {name}", "", f"{text[0].upper()}{text[1:]}.", ""]
        if own := list(rows(parsers[name], common=False)):
            lines += ["| argument | meaning |", "|---|---|", *own, ""]
    return "\n".join(lines)


def test_the_manual_has_every_verb_and_every_flag_as_help_has_them() -> None:
    manual = (cli_runs.ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert chapter().rstrip() in manual, f"docs/cli.md must say:\n{chapter()}"


MOVED = [
    (["plan", "m", "--drop", "1", "--criterion", "taylor"], "--criterion", "--option criterion=taylor"),
    (["run", "m", "--drop", "1", "--segments", "4"], "--segments", "--option plan.n_segments=4"),
    (
        ["plan", "m", "--quota", "global", "--profile=rows", "--estimator", "biased"],
        "--quota, --profile, --estimator",
        "--option quota=global --option profile=rows --option estimator=biased",
    ),
]


@pytest.mark.parametrize(("arguments", "flags", "now"), MOVED)
def test_a_flag_that_became_an_option_says_how_to_write_it(
    arguments: list[str], flags: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"sglp-deploy: error: {flags}: an option of the planner now; write {now}"


def test_a_plan_by_hand_takes_no_options_of_a_planner(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "m", "--drop-layers", "1", "--option", "criterion=taylor"])
    assert ended.value.code == 2
    assert "no planner would read --option; leave it out" in capsys.readouterr().err


def test_every_fault_of_the_planner_s_options_is_said_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = ["--option", "criterium=taylor", "--option", "n_segments=few", "--option", "quota=globl", "--rows", "raw"]
    assert main(["plan", "/nowhere/model", "--drop", "1", *wrong]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("error: unknown option of planner 'sglp' 'criterium'; ")
    assert "did you mean 'criterion'? the choices are criterion, estimator, n_segments, profile, quota" in lines[0]
    assert lines[1].startswith("error: n_segments='few' does not fit planner 'sglp'; ")
    assert lines[2].startswith("error: unknown quota 'globl'; ")


def test_help_loads_nothing_that_takes_long_to_import() -> None:
    """Measured so: ``--help`` takes 3.8 times as long as a bare interpreter; the promise is below 5."""
    code = (
        "import sys, contextlib, io\n"
        "from sglp_deploy.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:])))"
    )
    heavy = (
        "torch",
        "transformers",
        "numpy",
        "pydantic",
        "tqdm",
        "jinja2",
        "scipy",
        "filelock",
        "psutil",
        "safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy],
        env=cli_runs.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
