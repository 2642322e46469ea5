"""``heal``: what is written, what is said, what is refused, and what is left when the process is killed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import cli_runs
import tiny
from cli_runs import killed_and_resumed
from sglp_deploy.cli import flags, session
from sglp_deploy.cli.console import Console
from sglp_deploy.cli.main import main
from sglp_deploy.compressor import Compressor
from sglp_deploy.overlay import OVERLAY_FILE
from sglp_deploy.plan import PruningPlan

FEW = ("--sequence-length", "32", "--batch-size", "8", "--threads", "1", "--text", "builtin")
FEW = (*FEW, "--option", "held_out=512", "--option", "precision=fp32", "--option", "learning_rate=3e-3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture
def plan(model: Path, tmp_path: Path) -> Path:
    """A plan that drops layers 1 and 4."""
    file = tmp_path / "planned" / "plan.json"
    Compressor.from_pretrained(model).plan_by_hand([1, 4]).save(file)
    return file


def test_what_helps_is_written_beside_its_plan_and_said_in_words(
    model: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = plan.read_bytes(), tmp_path / "out"
    arguments = ["heal", str(model), str(plan), *FEW, "--tokens", "10K", "-o", str(out), "-q", "--json"]
    assert main(arguments) == 0
    *words, last = capsys.readouterr().out.splitlines()
    losses = r"5\.\d{4} dense, 5\.\d{4} before healing, \d\.\d{4} after"
    assert re.fullmatch(f"healing: kept; held-out loss {losses}", words[0]), words
    assert re.fullmatch(r"healed on builtin:calibration: 5\.\d+ dense, 5\.\d+ before, \d\.\d+ after", words[1])
    assert words[-1] == f"written to {out / 'plan.json'} and {out / OVERLAY_FILE}"
    assert json.loads(last) == json.loads((out / "plan.json").read_text())
    assert plan.read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [OVERLAY_FILE, "plan.json"]
    healed = PruningPlan.load(out / "plan.json")
    assert healed.overlay is not None
    (record,) = healed.overlay["made_by"]
    assert (record["options"]["tokens"], record["options"]["batch_size"], record["tokens"]) == (10_000, 8, 40 * 256)
    assert main(["show", str(out / "plan.json")]) == 0
    assert words[0] in capsys.readouterr().out
    assert main(["materialize", str(model), str(out / "plan.json"), "-o", str(tmp_path / "small"), "-q"]) == 0


def _budget(*given: str) -> Callable[[Path], list[str]]:
    return lambda _: [*given]


def _short(folder: Path) -> list[str]:
    (folder / "short.txt").write_text("The cat sat.")
    return ["--tokens", "1K", "--text", str(folder / "short.txt")]


def _a_run(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text("{}")
    return ["--tokens", "1K"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_budget(), r"healing has no budget; nothing says when to stop; give tokens \(1_000_000\), minutes \(15\) or"),
        (_budget("--tokens", "0"), "tokens=0 is no budget; nothing would be trained; "),
        (_budget("--minutes", "0"), r"minutes=0\.0 is no budget; nothing would be trained; "),
        (_budget("--tokens", "1K", "--option", "rate=1"), "unknown option of healing 'rate'; "),
        (_budget("--tokens", "1K", "--text", "/nowhere/text.txt"), "/nowhere/text.txt cannot be read; "),
        (
            _budget("--tokens", "1K", "--device", "cuda:63"),
            r"'cuda:63' was asked for, but PyTorch sees \d+ CUDA device",
        ),
        (_short, r"short\.txt gives 13 tokens, which fill 0 rows of 32; healing trains on some rows and is judged on"),
        (_a_run, "is the folder of a run; its plan would be replaced; choose another --output"),
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_written(
    spoil: Callable[[Path], list[str]],
    words: str,
    model: Path,
    plan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = spoil(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["heal", str(model), str(plan), *FEW, *more, "-o", str(tmp_path / "out"), "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.count(";") >= 1, err
    assert re.search(words, err), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("text", "number"), [("1M", 1_000_000), ("1.5m", 1_500_000), ("500K", 500_000), ("1_000", 1000), ("7", 7)]
)
def test_tokens_are_read_with_thousands_and_millions(text: str, number: int) -> None:
    assert flags._amount(text) == number


@pytest.mark.parametrize("text", ["", "M", "many", "1.5", "1G", "nan", "inf", "1.0001K"])
def test_what_is_no_number_of_tokens_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["heal", "m", "p", "--tokens", text, "-o", "o"])
    assert stopped.value.code == 2
    assert f"{text!r} is no number of tokens (500K, 1M, 200_000)" in capsys.readouterr().err


def test_the_text_a_plan_was_made_from_is_part_of_the_default_mix(tmp_path: Path) -> None:
    said: list[str] = []
    console = Console()
    console.note = said.append
    file = tmp_path / "mine.txt"
    file.write_text("A text that is long enough to be one.")
    made = tiny.plan_for(tiny.model(), (0, 1, 2))
    from_file = replace(made, calibration={"source": str(file)})
    parts = session.heal_corpus((), from_file, console)
    assert parts is not None
    assert [part if isinstance(part, str) else part.source for part in parts] == [
        str(file), "builtin", "general", "written",
    ]  # fmt: skip
    assert session.heal_corpus((), made, console) is None
    assert session.heal_corpus(("written", "general"), from_file, console) == ["written", "general"]
    assert said == []
    file.unlink()
    assert session.heal_corpus((), from_file, console) is None
    assert said == [f"{file}, which the plan was made from, is not at hand; healing goes without it"]


# ----------------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_resumes_to_the_same_bytes(
    kills: int, model: Path, plan: Path, tmp_path: Path
) -> None:
    tokens = "20K" if kills < 10 else "150K"
    arguments = ["heal", str(model), str(plan), *FEW, "--tokens", tokens, "-q", "-o"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*arguments, str(whole)]) == 0
    rng = random.Random(kills)
    delays = [rng.uniform(0, 0.4) for _ in range(kills)]
    assert killed_and_resumed([*arguments, str(broken)], broken, delays) >= min(kills, 2) // 2
    assert (broken / OVERLAY_FILE).read_bytes() == (whole / OVERLAY_FILE).read_bytes()
    one, other = (PruningPlan.load(folder / "plan.json") for folder in (whole, broken))
    assert one.digest() == other.digest()
    assert sorted(path.name for path in broken.iterdir()) == [OVERLAY_FILE, "plan.json"]
