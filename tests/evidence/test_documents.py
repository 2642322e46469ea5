"""People's files of text: what JSON lines may hold, how a file's kind is told, and what must not be cut or lost."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import tiny
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence import documents
from sglp_deploy.evidence.documents import Conversation, as_written, documents_of, pieces, read_text
from sglp_deploy.evidence.text import CalibrationSet

PROSE = "A miller and his daughter kept a small house beside the river."
ASKED, ANSWERED = "Who lived beside the river?", "A miller and his daughter."
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]


def written(folder: Path, *records: Any, name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (PROSE, PROSE),
        ({"text": PROSE, "prompt": "x"}, PROSE),
        ({"content": PROSE}, PROSE),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
        ({"prompt": "The sky is ", "completion": "blue."}, "The sky is blue."),
        ({"prompt": ASKED}, ASKED),
    ],
)
def test_a_text_is_read_from_the_keys_that_people_use(tmp_path: Path, record: Any, text: str) -> None:
    (found,) = documents_of(written(tmp_path, record))
    assert found == text
    assert not isinstance(found, Conversation)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}, CHAT[1]]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": []}, CHAT[1]]},
        {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
        {"prompt": [CHAT[0]], "chosen": [CHAT[1]], "rejected": [CHAT[0]]},
        {"instruction": ASKED, "input": "", "output": ANSWERED},
        {"question": ASKED, "answer": ANSWERED},
        {"prompt": ASKED, "response": ANSWERED},
        {"prompt": ASKED, "chosen": ANSWERED, "rejected": "Nobody."},
        {"chosen": CHAT, "rejected": [CHAT[0]]},
    ],
)
def test_questions_keep_their_answers(tmp_path: Path, record: dict[str, Any]) -> None:
    (found,) = documents_of(written(tmp_path, record))
    assert isinstance(found, Conversation)
    assert list(found.messages) == CHAT
    assert found == f"{ASKED}\n\n{ANSWERED}"


def test_what_an_instruction_is_about_belongs_to_the_question(tmp_path: Path) -> None:
    (found,) = documents_of(written(tmp_path, {"instruction": "Sum up.", "input": PROSE, "output": ANSWERED}))
    assert found == f"Sum up.\n\n{PROSE}\n\n{ANSWERED}"


def test_lines_that_leave_their_text_empty_are_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, {"text": PROSE}, {"text": None}, {"text": " "}, {"messages": []}, {"text": ANSWERED})
    assert documents_of(file) == [PROSE, ANSWERED]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"body": PROSE, "id": 3},
            "line 1 has no text; its keys are 'body', 'id'; texts are read",
        ),
        ({}, "it has no keys"),
        ([[PROSE]], "item 1 has no text; it has no keys"),
        ({"messages": [{"role": "user"}, "x"]}, "its keys are 'messages'"),
        ({"messages": [{"content": "x"}]}, "its keys are 'messages'"),
        (7, "line 1 has no text; it has no keys"),
    ],
)
def test_a_line_in_which_nothing_is_known_is_named_with_its_keys(tmp_path: Path, record: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        documents_of(written(tmp_path, record))


def test_half_a_surrogate_pair_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "and ' + "\\ud83d" + ' more"}\n')
    with pytest.raises(ConfigError, match="line 1 holds half a surrogate pair; no tokenizer reads it; mend the text"):
        documents_of(file)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\u000c"])
def test_a_separator_inside_a_text_ends_no_line(tmp_path: Path, mark: str) -> None:
    assert documents_of(written(tmp_path, {"text": f"one{mark}two"})) == [f"one{mark}two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "a.jsonl.txt", "a.json", "a"])
def test_json_lines_are_told_by_name_or_by_the_first_line(tmp_path: Path, name: str) -> None:
    assert documents_of(written(tmp_path, {"text": PROSE}, {"text": PROSE}, name=name)) == [PROSE, PROSE]


@pytest.mark.parametrize("text", ["{braces} begin it}", "{not json}", "[1] a list of sources follows here"])
def test_prose_that_begins_with_a_brace_is_prose(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert documents_of(tmp_path / "a.txt") == [text]


def test_one_array_of_objects_is_read_like_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": PROSE}, {"messages": CHAT}], indent=1))
    assert documents_of(tmp_path / "a.json") == [PROSE, f"{ASKED}\n\n{ANSWERED}"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    content = PROSE if name == "a.txt" else json.dumps({"text": PROSE})
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert documents_of(tmp_path / name) == [PROSE]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_once_and_gives_the_same_to_whoever_asks_again(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(PROSE,))
    writer.start()
    assert documents_of(pipe) == [PROSE]
    writer.join()
    assert documents_of(pipe) == [PROSE]


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(PROSE)
    assert read_text(tmp_path / "a.txt", "text") == PROSE
    (tmp_path / "a.txt").write_text(ANSWERED)
    assert read_text(tmp_path / "a.txt", "text") == ANSWERED


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no text"):
        documents_of(written(tmp_path, {"text": ""}))


@pytest.mark.parametrize("between", [" ", "\n", ""])
def test_a_long_line_is_cut_into_pieces_that_hold_all_of_it(between: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 50)
    text = between.join(["miller"] * 60)
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert all(len(piece) <= 50 for piece in cut)
    assert all(piece.startswith(between) for piece in cut[1:])


def test_no_more_of_a_long_line_is_made_tokens_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 50)
    tokenizer = tiny.tokenizer()
    read: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, text: str, **options: Any) -> Any:
        read.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    data = CalibrationSet((("miller " * 1000).strip(),), "a line", max_tokens=64, sequence_length=32)
    whole = CalibrationSet((("miller " * 20).strip(),), "a line", max_tokens=64, sequence_length=32)
    assert (data.encode(tokenizer).input_ids == whole.encode(tokenizer).input_ids).all()
    assert sum(read[:3]) < 200


def test_a_conversation_goes_through_the_chat_template_where_there_is_one() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = Conversation(CHAT)
    assert as_written(found, tokenizer) == f"<user>{ASKED}<assistant>{ANSWERED}"
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert as_written(found, tokenizer) == found
    tokenizer.chat_template = None
    assert as_written(found, tokenizer) == found
    assert as_written(PROSE, tokenizer) == PROSE
    ids = CalibrationSet((found,), "chat", max_tokens=64, sequence_length=32).encode(tokenizer)
    assert ids.n_tokens == len(f"{ASKED}\n\n{ANSWERED}") + 1
