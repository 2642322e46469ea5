"""What a request means, and every fault of several requests at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cli_runs
from sglp_deploy.errors import ConfigError
from sglp_deploy.tasks.asked import file_of, read_tasks, split
from sglp_deploy.tasks.last_word import LastWord
from sglp_deploy.tasks.multiple_choice import MultipleChoice

LINE = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'


def test_a_path_alone_is_multiple_choice_and_a_kind_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(LINE * 3)
    (tmp_path / "two.txt").write_text("some words\n" * 3)
    first, second = read_tasks([str(tmp_path / "one.jsonl"), f"last-word:{tmp_path / 'two.txt'}"], limit=2)
    assert isinstance(first, MultipleChoice)
    assert isinstance(second, LastWord)
    assert (first.name, len(first.questions), second.name, len(second.passages)) == ("one", 2, "two", 2)
    assert split("choice:one.jsonl") == ("choice", "one.jsonl")
    assert split("last-word:C:\\texts\\two.txt") == ("last-word", "C:\\texts\\two.txt")
    assert split("C:\\texts\\one.jsonl") == ("choice", "C:\\texts\\one.jsonl")
    assert file_of("last-word:two.txt") == "two.txt"
    assert file_of("nonsense:two.txt") == "nonsense:two.txt"


def test_a_file_whose_name_holds_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my:questions.jsonl").write_text(LINE)
    assert split("my:questions.jsonl") == ("choice", "my:questions.jsonl")


def test_all_faults_are_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(LINE)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/one.jsonl").write_text(LINE)
    asked = [str(tmp_path / "one.jsonl"), "last-wrod:x", "choice:", str(tmp_path / "none.jsonl")]
    with pytest.raises(ConfigError) as caught:
        read_tasks([*asked, str(tmp_path / "sub/one.jsonl")])
    unknown, nothing, missing, twice = caught.value.faults
    assert unknown.startswith(
        "unknown kind of task 'last-wrod'; nothing is registered under that name; did you mean 'l"
    )
    assert nothing == "'choice:' names no task; nothing could be judged; write choice:FILE"
    assert missing == f"task file {tmp_path}/none.jsonl cannot be read; No such file or directory; check the path"
    assert twice == "two tasks are called 'one'; a report could not tell them apart; rename the file of one"


def test_a_task_is_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(LINE)
    (tmp_path / "two.txt").write_text("some words\n")
    code = (
        "import sys\nfrom sglp_deploy.tasks.asked import read_tasks\n"
        f"assert len(read_tasks(['{tmp_path}/one.jsonl', 'last-word:{tmp_path}/two.txt'])) == 2\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=cli_runs.environment(), capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
