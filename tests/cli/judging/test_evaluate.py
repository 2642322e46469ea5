"""``evaluate`` with a plan and tasks, the same in a run, and what makes a run judge again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cli_runs
from sglp_deploy import Compressor, PruningPlan
from sglp_deploy.cli import show
from sglp_deploy.cli.main import main
from sglp_deploy.tasks.asked import read_tasks

FEW = ("--tokens", "96", "--chunk", "32")
QUESTIONS = [
    {"question": "Where do fish live?", "choices": ["in water", "on trees"], "answer": 0},
    {"question": "A cat says", "choices": ["woof", "meow", "moo"], "answer": "meow"},
    {"question": "Snow is", "choices": ["cold", "warm"], "answer": 0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_runs.tiny_model(tmp_path_factory)


@pytest.fixture(scope="module")
def plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    assert main(["plan", str(model), "--drop-layers", "2,4", "-q", "-o", str(file)]) == 0
    return file


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "animals.jsonl"
    file.write_text("".join(f"{json.dumps(item)}\n" for item in QUESTIONS))
    return file


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    file = tmp_path / "ends.txt"
    file.write_text("The cat sat on the mat.\nSnow is white and very cold\n")
    return file


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[Any, str]:
    capsys.readouterr()
    assert main([str(item) for item in arguments] + ["-q", "--json"]) == code
    text, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    return json.loads(last), text


def test_a_plan_is_judged_beside_the_unpruned_model_by_every_task(
    model: Path, plan: Path, questions: Path, passages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ("--tasks", questions, "--tasks", f"last-word:{passages}")
    file = tmp_path / "quality.json"
    value, text = answer(capsys, "evaluate", model, plan, *FEW, *tasks, "--sample-tokens", 5, "-o", file)
    assert value == json.loads(file.read_text())
    assert value["schema"].startswith("quality/")
    # What the public functions say of the two checkpoints, each loaded on its own.
    dense = Compressor.from_pretrained(model)
    smaller = tmp_path / "smaller"
    dense.save(PruningPlan.load(plan), smaller)
    pruned = Compressor.from_pretrained(smaller)
    asked = read_tasks([str(questions), f"last-word:{passages}"])
    assert value["tasks"].keys() == {"animals", "ends"}
    for arm, one in (("dense", dense), ("pruned", pruned)):
        alone = one.evaluate_tasks(asked)
        for name, found in alone.items():
            assert value["tasks"][name]["by_item"][arm] == found["by_item"]["model"]
            for metric, figure in found["metrics"].items():
                there = value["tasks"][name]["metrics"][metric]
                assert there[arm] == {key: figure[key] for key in ("value", "interval")}
                assert there["difference"] == pytest.approx(there["pruned"]["value"] - there["dense"]["value"])
    assert value["tasks"]["animals"]["n_items"] == 3
    assert [row["dense"]["n_tokens"] for row in value["generation"]["rows"]] == [5, 5, 5, 5]
    assert text == show.describe(value)
    line = next(line for line in text.splitlines() if line.startswith("animals (3)") and "by length" in line)
    found = value["tasks"]["animals"]["metrics"]["acc_norm"]
    low, high = found["difference_interval"]
    assert line.endswith(f"  {found['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
    shares = [value["generation"]["repetition"][arm] for arm in ("dense", "pruned")]
    assert "greedy, up to 5 tokens; repeated runs of 4 tokens: dense {:.0%}, pruned {:.0%}".format(*shares) in text
    for row in value["generation"]["rows"]:
        assert f"\n{row['prompt']}\n" in text


def test_a_model_alone_is_judged_by_a_task_too(
    model: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, text = answer(capsys, "evaluate", model, *FEW, "--tasks", questions, "--tasks-limit", 2)
    assert value["schema"] == "perplexity/1"
    assert value["tasks"]["animals"]["n_items"] == 2
    assert "difference" not in value["tasks"]["animals"]["metrics"]["acc"]
    figure = value["tasks"]["animals"]["metrics"]["acc"]
    low, high = figure["interval"]
    assert f"animals (2)   accuracy             {figure['value']:.3f} ({low:.3f} to {high:.3f})" in text


def test_samples_and_overlays_need_a_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (("--sample-tokens", "5"), ("--overlay", "x.safetensors")):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(model), *flag])
        assert ended.value.code == 2
        assert "--overlay and --sample-tokens go with a plan; the model alone is judged" in capsys.readouterr().err


def test_a_wrong_task_is_refused_before_the_model_is_loaded_by_evaluate_and_by_run(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions.write_text(questions.read_text() + '{"question": "q", "choices": ["a"], "answer": 0}\n')
    words = f"error: {questions} line 4 has 1 choice; there is nothing to choose between; give two or more\n"
    assert main(["evaluate", "/nowhere/model", "--tasks", str(questions), "-q"]) == 1
    assert capsys.readouterr().err == words
    assert main(["run", "/nowhere/model", "--drop", "1", "--tasks", str(questions), "-q", "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err == words


def test_a_run_has_tasks_and_a_sample_and_judges_again_when_a_file_s_content_changes(
    model: Path, questions: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    cli_runs.quick(monkeypatch)
    folder = Path(shutil.copytree(cli_runs.finished_run(tmp_path_factory), tmp_path / "run"))

    def again(*more: str) -> list[str]:
        """The stages that were not kept, in order."""
        assert main(cli_runs.run_arguments(model, folder, *more, "--tasks-limit", "2")) == 0
        found = json.loads((folder / "run.json").read_text())["stages"]
        return [name for name, stage in found.items() if stage["note"] != "kept"]

    quality = json.loads((folder / "quality.json").read_text())
    assert "tasks" not in quality
    assert [row["pruned"]["n_tokens"] for row in quality["generation"]["rows"]] == [6] * 4
    assert again("--tasks", f"{questions},") == ["quality", "report"]
    found = json.loads((folder / "quality.json").read_text())
    assert found["tasks"]["animals"]["n_items"] == 2
    assert found["dense"] == quality["dense"]
    assert again("--tasks", str(questions)) == []
    moved = questions.rename(tmp_path.parent / questions.name)
    assert again("--tasks", str(moved)) == []
    moved.write_text("".join(f"{json.dumps(item)}\n" for item in reversed(QUESTIONS)))
    assert again("--tasks", str(moved)) == ["quality", "report"]
    assert again("--sample-tokens", "0") == ["quality", "report"]
    assert not {"tasks", "generation"} & json.loads((folder / "quality.json").read_text()).keys()


def test_what_a_model_writes_cannot_move_the_cursor_of_a_terminal() -> None:
    written = {"text": "a\x1b[2Jb\n\nc\u202ed", "n_tokens": 3}
    row = {"prompt": "p", "dense": written, "pruned": written}
    record = {"decoding": "greedy", "repetition": {"n": 4, "dense": None, "pruned": 0.5}, "rows": [row]}
    quality = {"perplexity": 1.0, "nats_per_token": 0.0}
    protocol = {"n_tokens": 1, "text": "t", "chunk_tokens": 8}
    facts = {"schema": "quality/2", "ratio": 1.0, "ratio_interval": [1, 1], "protocol": protocol}
    text = show.describe({**facts, "dense": quality, "pruned": quality, "generation": record})
    assert text.endswith("\np\n  dense  a\ufffd[2Jb c\ufffdd\n  pruned a\ufffd[2Jb c\ufffdd")
    assert "repeated runs of 4 tokens: dense -, pruned 50%" in text
    assert show.describe(
        {**facts, "dense": quality, "pruned": quality, "generation": {"not_made": "it broke"}}
    ).endswith("\n\nno sample was written: it broke")
