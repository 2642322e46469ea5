from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches, builtin_digest

PROSE = "The quick brown fox jumps over the lazy dog, again and again."


class _TokenizerWithStart:
    """Adds a begin-of-text token by itself, as Gemma's and Llama's do."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(letter) % 50 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_documents_follow_one_another_separated_by_the_end_token() -> None:
    data = CalibrationSet(("first document", "second document"), "test", sequence_length=64)
    batches = data.encode(tiny.tokenizer())
    text = tiny.tokenizer().decode(batches.input_ids[0][batches.attention_mask[0] == 1])
    assert sorted(text.split("<eos>")) == ["", "first document", "second document"]
    assert batches.n_samples == 1
    assert batches.n_tokens == len("first document") + len("second document") + 2


def test_every_row_starts_with_the_begin_token_when_the_tokenizer_adds_one() -> None:
    data = CalibrationSet(("x" * 100,), "test", sequence_length=32)
    batches = data.encode(_TokenizerWithStart())  # type: ignore[arg-type]
    assert batches.n_samples == 4
    assert (batches.input_ids[:, 0] == 1).all()
    assert (batches.input_ids[:, 1:] != 1).all()


def test_no_begin_token_is_invented_when_the_tokenizer_adds_none() -> None:
    assert tiny.tokenizer().bos_token_id is not None
    batches = CalibrationSet((PROSE,), "test", sequence_length=16).encode(tiny.tokenizer())
    assert not (batches.input_ids == tiny.tokenizer().bos_token_id).any()


def test_a_short_tail_is_dropped_and_a_longer_one_is_padded_on_the_right() -> None:
    ids = np.arange(1, 41)
    kept = CalibrationSet.from_token_ids([ids], sequence_length=16).encode(None)
    assert kept.input_ids[2].tolist() == [*range(33, 41), *[0] * 8]
    assert kept.attention_mask[2].tolist() == [1] * 8 + [0] * 8
    dropped = CalibrationSet.from_token_ids([ids[:35]], sequence_length=16).encode(None)
    assert dropped.n_samples == 2
    assert dropped.n_tokens == 32


def test_the_token_budget_is_kept_and_batches_cover_every_row_once() -> None:
    data = CalibrationSet.from_token_ids([np.arange(1000)], max_tokens=160, sequence_length=16, batch_size=3)
    batches = data.encode(None)
    assert (batches.n_samples, batches.n_tokens, len(batches)) == (10, 160, 4)
    parts = list(batches)
    assert [len(ids) for ids, _ in parts] == [3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]).reshape(-1), np.arange(160))
    assert data.resized(32).encode(None).n_tokens == 32


def test_the_seed_decides_the_order_and_the_digest_tells() -> None:
    documents = tuple(f"document number {n} says {n * n} things" for n in range(20))
    one, same, other = (
        CalibrationSet(documents, "test", seed=seed, sequence_length=32).encode(tiny.tokenizer()) for seed in (0, 0, 1)
    )
    assert one.digest == same.digest != other.digest
    np.testing.assert_array_equal(one.input_ids, same.input_ids)


def test_the_digest_sees_the_mask() -> None:
    # Padding is token 0, so these two have the same ids and differ only in which of them count.
    real = CalibrationSet.from_token_ids([np.r_[np.arange(1, 25), np.zeros(8, int)]], sequence_length=16).encode(None)
    padded = CalibrationSet.from_token_ids([np.arange(1, 25)], sequence_length=16).encode(None)
    np.testing.assert_array_equal(real.input_ids, padded.input_ids)
    assert real.digest != padded.digest


def test_the_halves_of_the_built_in_text_share_no_paragraph() -> None:
    calibration, held_out = CalibrationSet.builtin(), CalibrationSet.builtin_held_out()
    paragraphs = [
        {" ".join(block.split()) for document in half.documents for block in str(document).split("\n\n")}
        for half in (calibration, held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert len(set(calibration.documents)) == len(calibration.documents)
    assert sum(map(len, calibration.documents)) > 200_000
    assert sum(map(len, held_out.documents)) > 60_000
    assert (calibration.source, held_out.source) == ("builtin:calibration", "builtin:held-out")
    assert builtin_digest() == builtin_digest()


def test_a_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    file = _write(tmp_path / "a.txt", f"{PROSE}\r\nstill the first\r\n\r\nshort\r\n\r\n{PROSE} Second.\r\n")
    data = CalibrationSet.from_text(file, seed=3)
    assert data.documents == (f"{PROSE}\nstill the first", f"{PROSE} Second.")
    assert (data.source, data.seed) == (str(file), 3)


def test_a_file_of_a_few_short_lines_is_still_text(tmp_path: Path) -> None:
    assert CalibrationSet.from_text(_write(tmp_path / "a.txt", "one\n\ntwo\n")).documents == ("one\n\ntwo",)


def test_json_lines_are_read_by_their_text(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "one"}),
        "",
        json.dumps({"content": "two", "text": 3}),
        json.dumps("three"),
        '{"text": " "}',
    ]
    data = CalibrationSet.from_text(_write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert data.documents == ("one", "two", "three")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{', ConfigError, r"line 2 is not JSON; .*one JSON object a line is read"),
        (
            "a.jsonl",
            b'{"body": "x"}',
            ConfigError,
            "line 1 has no text; its keys are 'body'; .*write one of",
        ),
        ("a.txt", b"\xff\xfe\x00", ConfigError, r"a\.txt cannot be read; it is not UTF-8 text; check the path"),
        ("a.txt", b" \n\n ", CalibrationError, r"a\.txt holds no text; .*give a file with prose"),
        ("a.jsonl", b"\n", CalibrationError, r"a\.jsonl holds no text"),
    ],
)
def test_an_unusable_file_is_refused(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        CalibrationSet.from_text(tmp_path / name)


@pytest.mark.parametrize(("name", "reason"), [("none.txt", "No such file"), ("", "Is a directory")])
def test_a_missing_file_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"calibration text .* cannot be read; {reason}.*; check the path"):
        CalibrationSet.from_text(tmp_path / name)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"token ids gives 7 tokens; similarity needs at least 8 in a row; give"):
        CalibrationSet.from_token_ids([np.arange(7)]).encode(None)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"builtin:calibration is text, but the model has no tokenizer; add"):
        CalibrationSet.builtin().encode(None)


def test_all_wrong_numbers_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        CalibrationSet(("text",), "test", max_tokens=0, sequence_length=2, batch_size=0)
    assert caught.value.faults == [
        "max_tokens=0 must be at least 8",
        "sequence_length=2 must be at least 8",
        "batch_size=0 must be at least 1",
    ]


def test_what_a_user_names_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CalibrationSet.parse(None).source == CalibrationSet.parse("builtin").source == "builtin:calibration"
    assert CalibrationSet.parse(str(_write(tmp_path / "a.txt", PROSE))).documents == (PROSE,)
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return ({"text": f"{PROSE} {n}"} for n in range(10**6))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = CalibrationSet.parse("hf:wikitext:wikitext-2-raw-v1", max_tokens=64)
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "train", "streaming": True})]
    assert data.source == "dataset:wikitext:wikitext-2-raw-v1:train"
    assert data.documents[0] == f"{PROSE} 0"
    assert 512 <= sum(map(len, data.documents)) < 512 + 80  # streamed no further than the budget needs


def test_a_dataset_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_arguments: Any, **_options: Any) -> Any:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ConfigError, match=r"dataset 'x' cannot be read; no route to host; check the id"):
        CalibrationSet.parse("hf:x")


def test_a_dataset_without_the_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"needs the datasets package; .*pip install datasets"):
        CalibrationSet.from_dataset("x")


def test_batches_compare_by_identity_and_by_digest() -> None:
    one, two = (CalibrationSet.from_token_ids([np.arange(16)]).encode(None) for _ in range(2))
    assert isinstance(one, TokenBatches)
    assert one != two
    assert one.digest == two.digest
