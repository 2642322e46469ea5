"""``[accept]``: limits from a file and from flags, exit code 5 when one is missed, and their faults in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_deploy import _io
from sglp_deploy.cli.config import RunConfig
from sglp_deploy.cli.exits import Exit
from sglp_deploy.cli.main import build_parser, main
from sglp_deploy.errors import ConfigError

FILE = """
[model]
path = "m"
[plan]
drop = 1
[evaluate]
tasks = ["data/piqa.jsonl", "last-word:ends.txt"]
[accept]
perplexity = "1.5x"
decode = "1.1x"
parity = "passed"
[accept.tasks]
piqa = "-0.03"
ends = "0.9x"
"""


def load(folder: Path, content: str, **flags: Any) -> RunConfig:
    (folder / "sglp.toml").write_text(content)
    return RunConfig.load(folder / "sglp.toml", **flags)


def test_limits_come_from_the_file_and_a_flag_wins(tmp_path: Path) -> None:
    expected = {"perplexity": "1.5x", "decode": "1.1x", "parity": "passed", "tasks": {"piqa": "-0.03", "ends": "0.9x"}}
    assert load(tmp_path, FILE).limits == expected
    assert load(tmp_path, FILE, accept_decode="1.2x", accept_size="0.9x").limits == {
        **expected, "decode": "1.2x", "size": "0.9x",
    }  # fmt: skip
    assert load(tmp_path, FILE[: FILE.index("[accept]")]).limits == {}
    asked = ["run", "m", "--drop", "1", "--accept-tasks", "piqa=0.9x", "--accept-tasks", "ends=-0.1"]
    assert build_parser().parse_args(asked).accept_tasks == {"piqa": "0.9x", "ends": "-0.1"}


def test_every_fault_of_the_limits_is_said(tmp_path: Path) -> None:
    wrong = FILE.replace('"1.1x"', '"1.1"').replace('"passed"', '"yes"').replace('piqa = "-0.03"', 'piqua = "-0.03"')
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, wrong.replace('"1.5x"', "1.5"))
    kind, choice, decode, task = caught.value.faults
    assert kind.endswith('[accept] perplexity = 1.5 is of the wrong kind; a text like "1.5x" is read; change it')
    assert choice.startswith("unknown accept_parity 'yes'; ")
    assert decode == (
        "[accept] decode = '1.1' is no limit; a multiple of the unpruned model's figure is read (\"1.5x\"); write it so"
    )
    assert task == (
        "a limit is given for the task 'piqua', which is not asked; nothing would measure it; the tasks are piqa, ends"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, FILE.replace('ends = "0.9x"', "ends = 0.9"))
    assert caught.value.faults[0].endswith(
        'is of the wrong kind; a table [accept.tasks] of limits like "0.95x" (times the unpruned model\'s) or "-0.03" '
        "(more than it) is read; change it"
    )


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cli_runs.quick(monkeypatch)
    return Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory), tmp_path / "run"))


def test_a_missed_limit_ends_a_run_with_its_own_code_and_only_the_report_is_made_again(
    run: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cli_runs.tiny_model(tmp_path_factory)

    def again(*flags: str) -> tuple[int, Any, list[str]]:
        capsys.readouterr()
        code = main([*cli_runs.run_arguments(model, run, *flags), "--json"])
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        stages = json.loads((run / "run.json").read_text())["stages"]
        return code, answer, [name for name, stage in stages.items() if stage["note"] != "kept"]

    # The times are planted: decoding is 1.25 times as fast.  The tiny model's weights are what is in its files.
    good = ("--accept-decode", "1.1x", "--accept-size", "0.95x", "--accept-parity", "passed")
    code, answer, stages = again(*good)
    assert (code, stages) == (Exit.DONE, ["report"])
    assert answer["accept"]["accepted"] is True
    assert answer["rows"]["limits"] == "all 3 are met"
    assert "✓ Accepted: All 3 limits are met" in (run / "report" / "report.html").read_text()

    code, answer, stages = again(*good[2:], "--accept-decode", "1.5x")
    assert (code, answer["exit_code"], stages) == (Exit.LIMIT, 5, ["report"])
    decode = next(found for found in answer["accept"]["findings"] if found["name"] == "decode (onnx)")
    assert f"decode (onnx): {answer['rows']['MISSED decode (onnx)']}" == decode["sentence"]
    assert decode["sentence"].startswith("decode (onnx): at least 1.5x is asked; it is 1.2")
    page = (run / "report" / "report.html").read_text()
    assert page.index("✗ Not accepted: 1 of 3 limits missed") < page.index("The stack, first layer on the left")
    assert decode["sentence"] in page
    capsys.readouterr()
    assert main(["show", str(run / "report")]) == 0
    assert f"\nMISSED: {decode['sentence']}\n" in capsys.readouterr().out

    # Of several, none hides another.
    both = ("--accept-decode", "1.5x", "--accept-size", "0.1x")
    code, answer, _ = again(*both)
    assert [name for name in answer["rows"] if "MISSED" in name] == ["MISSED decode (onnx)", "MISSED size (onnx)"]
    code, answer, _ = again(*good[2:], "--accept-decode", "1.5x")

    # Kept as it is, and still missed; rendered again from the folder alone, the verdict stays.
    assert again(*good[2:], "--accept-decode", "1.5x")[::2] == (Exit.LIMIT, [])
    assert main(["report", str(run), "-q"]) == 0
    assert json.loads((run / "report" / "report.json").read_text())["accept"] == answer["accept"]

    code, answer, stages = again()
    assert (code, answer["accept"], stages) == (Exit.DONE, None, ["report"])
    assert "accepted" not in (run / "report" / "report.html").read_text().lower()


def test_failed_parity_keeps_its_own_code(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from sglp_deploy.cli.outcome import outcome_of
    from sglp_deploy.parity.certificate import ParityReport
    from sglp_deploy.plan import PruningPlan

    passed = ParityReport.load(run / "parity" / "onnx.json")
    replace(passed, reasons=("planted",)).save(run / "parity" / "onnx.json")
    value = json.loads((run / "run.json").read_text()) | {"accept": {"parity": "passed"}}
    value["stages"]["parity onnx"]["outputs"]["parity/onnx.json"] = _io.sha256_file(run / "parity" / "onnx.json")
    (run / "run.json").write_text(json.dumps(value))
    assert main(["report", str(run), "-q"]) == 0
    plan = PruningPlan.load(run / "plan.json")
    assert outcome_of(run, plan, {}).exit_code == Exit.PARITY
    passed.save(run / "parity" / "onnx.json")
    # The verdict is the report's; a format that failed says less than a limit that is missed.
    assert outcome_of(run, plan, {"export x": "it broke"}).exit_code == Exit.LIMIT
