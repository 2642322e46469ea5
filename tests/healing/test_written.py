"""What the unpruned model writes has its own distribution, is written once, and is found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy.errors import CalibrationError
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.texts import written
from sglp_deploy.healing.texts.written import cache_folder, write, written_text

OPTIONS = HealOptions(tokens=1, written=256, precision="fp32")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(options: HealOptions = OPTIONS, seed: int = 0) -> list[list[int]]:
    return [row.tolist() for row in written_text(tiny.loaded(seed=seed), options).documents]


def test_it_is_written_once_and_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows()
    assert [len(row) for row in first] == [128, 128]
    (file,) = cache_folder().iterdir()
    again = cache_folder() / "kept"
    file.rename(again)
    assert rows() == first  # the same seed writes the same
    again.replace(file)
    monkeypatch.setattr(written, "write", lambda *_, **__: pytest.fail("written again"))
    assert rows() == first


def test_another_model_seed_or_length_has_a_file_of_its_own() -> None:
    first = rows()
    others = [rows(seed=1), rows(HealOptions(tokens=1, written=256, precision="fp32", seed=1))]
    assert all(other != first for other in others)
    assert len(rows(HealOptions(tokens=1, written=300, precision="fp32"))) == 3
    assert len(list(cache_folder().iterdir())) == 4


@pytest.mark.parametrize("spoiled", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_of_the_cache_is_written_again(spoiled: bytes) -> None:
    first = rows()
    (file,) = cache_folder().iterdir()
    file.write_bytes(spoiled)
    assert rows() == first
    assert file.read_bytes() != spoiled


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [len(row) for row in rows()] == [128, 128]


def test_tokens_come_as_often_as_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every position has the same distribution: one third token 5, two thirds token 9, whatever came before.
    loaded = tiny.loaded("llama-untied")
    with torch.no_grad():
        loaded.module.get_parameter("model.norm.weight").zero_()
    chances = torch.full((tiny.VOCAB_SIZE,), -1e9)
    chances[5], chances[9] = torch.tensor([1 / 3, 2 / 3]).log()
    head = loaded.module.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _given, out: out + chances)
    monkeypatch.setattr(written, "_LENGTH", 40)
    found = write(loaded, 100, seed=0, precision=torch.float32)[:, 20:]
    handle.remove()
    assert {*np.unique(found)} == {5, 9}
    assert np.mean(found == 5) == pytest.approx(1 / 3, abs=0.05)


def test_a_model_with_a_chat_template_writes_conversations_by_turns() -> None:
    loaded = tiny.loaded()
    template = "<|user|>{{ messages[0]['content'] }}<|end|>"
    loaded.tokenizer.chat_template = template
    opening = loaded.tokenizer("<|user|>", add_special_tokens=False)["input_ids"]
    found = write(loaded, 140, seed=0, precision=torch.float32)
    asked = (found[:, : len(opening)] == opening).all(1)
    assert asked.tolist() == [False] * 64 + [True] * 64 + [False] * 12
    assert len({tuple(row) for row in found[64:128].tolist()}) == 64  # one opening, and as many conversations


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('only tools') }}", "no message", "{{ messages[0].content }}"]
)
def test_without_words_before_the_user_s_it_writes_running_text_alone(template: str | None) -> None:
    loaded = tiny.loaded()
    loaded.tokenizer.chat_template = None
    plain = write(loaded, 70, seed=0, precision=torch.float32)
    loaded.tokenizer.chat_template = template
    assert np.array_equal(write(loaded, 70, seed=0, precision=torch.float32), plain)


def test_less_than_one_piece_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"written=100 tokens are less than one piece of 128; .*name other texts"
    ):
        rows(HealOptions(tokens=1, written=100))
