"""Lines that Python's reader fails on in other ways than by a fault of syntax are refused by their number too."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglp_deploy.errors import ConfigError
from sglp_deploy.tasks.asked import read_tasks

WRONG = [
    ('{"text": "one two"', "is not JSON; Expecting ',' delimiter; one JSON object a line is read"),
    (r'{"text": "one \ud800"}', "holds half a surrogate pair; no tokenizer reads it; mend the text"),
    ("[" * 100_000, "is nested too deeply; one flat object a line is read; change it"),
    ('{"text": ' + "9" * 5_000 + "}", "holds a number that is too long; no item needs it; change it"),
]


@pytest.mark.parametrize("kind", ["choice", "last-word"])
@pytest.mark.parametrize(("line", "words"), WRONG, ids=["syntax", "surrogate", "depth", "number"])
def test_a_line_that_cannot_be_read_is_refused_by_its_number(kind: str, line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_tasks([f"{kind}:{file}"])
    assert str(caught.value) == f"{file} line 2 {words}"


def test_a_whole_surrogate_pair_and_a_file_of_another_system_are_read(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(b'{"question": "\\ud83d\\ude00?", "choices": ["yes", "no"], "answer": "no"}\r\n')
    (task,) = read_tasks([str(file)])
    (question,) = task.questions
    assert (question.text, question.choices, question.answer) == ("\U0001f600?", ("yes", "no"), 1)
