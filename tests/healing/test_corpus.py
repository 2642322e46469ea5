"""Shares take turns, none is judged on what it is trained on, and what is missing is said."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.text import CalibrationSet
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.texts import corpus, general
from sglp_deploy.healing.texts.corpus import MOST_EPOCHS, Mix, Share, mix_of
from sglp_deploy.healing.texts.parts import default_parts

OPTIONS = HealOptions(tokens=4096, sequence_length=16, held_out=256, written=128)


def share(name: str, rows: int) -> Share:
    return Share(name, np.zeros((rows, 8), dtype=np.int64), np.zeros((1, 8), dtype=np.int64))


def test_shares_take_turns_and_each_pass_has_every_row_once_in_another_order() -> None:
    mix = Mix((share("small", 5), share("large", 100)), seed=3)
    drawn = list(islice(mix.drawn(), 40))
    assert [number for number, _ in drawn] == [0, 1] * 20
    small = [row for number, row in drawn if number == 0]
    passes = [tuple(small[start : start + 5]) for start in range(0, 20, 5)]
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in passes)
    assert len(set(passes)) > 1
    assert list(islice(mix.drawn(17), 5)) == drawn[17:22]
    assert list(islice(Mix(mix.shares, seed=4).drawn(), 40)) != drawn


def test_a_share_waits_after_four_passes_until_the_others_have_had_theirs() -> None:
    mix = Mix((share("small", 5), share("large", 50)), seed=0)
    counts = Counter(islice(mix.drawn(), MOST_EPOCHS * 55))
    assert set(counts.values()) == {MOST_EPOCHS}
    assert len(counts) == 55
    later = Counter(number for number, _ in islice(mix.drawn(MOST_EPOCHS * 55), 20))
    assert later == {0: 10, 1: 10}


def test_rows_are_full_and_the_last_of_each_text_are_held_out(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\n\n".join("a" * 60 for _ in range(40)))
    second.write_text("\n\n".join("b" * 60 for _ in range(4)))
    texts = [CalibrationSet.from_text(file) for file in (first, second)]
    loaded = tiny.loaded()
    mix = mix_of(texts, loaded, OPTIONS)
    letters = [int(loaded.tokenizer("ab")["input_ids"][place]) for place in (0, 1)]
    for letter, part in zip(letters, mix.shares, strict=True):
        assert part.rows.shape[1] == part.held_out.shape[1] == 16
        assert all({*np.unique(rows)} - {258} == {letter} for rows in (part.rows, part.held_out))
    # 2,440 tokens and 244, in rows of 16; 256 held-out tokens are 16 rows, at most an eighth of a text's.
    assert [(len(part.rows), len(part.held_out)) for part in mix.shares] == [(152 - 8, 8), (15 - 1, 1)]
    assert mix.held_out.shape == (9, 16)
    assert mix.digest == mix_of(texts, loaded, OPTIONS).digest != mix_of(texts[:1], loaded, OPTIONS).digest


def test_a_text_of_less_than_two_rows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("x" * 31)
    words = (
        r"short\.txt gives 32 tokens, which fill 1 rows of 32; healing trains on some rows and is judged on others; "
    )
    with pytest.raises(CalibrationError, match=f"{words}give more text, or a smaller sequence_length"):
        mix_of([CalibrationSet.from_text(file)], tiny.loaded(), HealOptions(tokens=1, sequence_length=32))


def test_the_default_mix_has_the_plan_s_text_once_and_three_others() -> None:
    own = CalibrationSet.from_token_ids([np.arange(99)])
    assert default_parts(own) == (own, "builtin", "general", "written")
    assert default_parts(CalibrationSet.builtin()) == ("builtin", "general", "written")
    assert default_parts(own, tokenizer=False) == (own, "written")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = tuple(np.full(64, 7) for _ in range(4))
    monkeypatch.setattr(corpus, "written_text", lambda *_: CalibrationSet(pieces, "written"))


@pytest.mark.usefixtures("written")
def test_without_its_package_the_general_text_is_left_out_of_the_default_and_an_error_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(general, "_folder", lambda: None)
    mix = mix_of(["builtin", "general", "written"], tiny.loaded(), OPTIONS, optional=True)
    assert [part.name for part in mix.shares] == ["builtin:calibration", "written"]
    (why,) = mix.left_out
    assert why == (
        "the text 'general' comes with the package gensim, which is not installed here; the mix lacks it; pip install "
        "'sglp-deploy[heal]'"
    )
    with pytest.raises(CalibrationError, match="comes with the package gensim"):
        mix_of(["general"], tiny.loaded(), OPTIONS)


def test_news_and_articles_are_read_where_the_package_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bz2
    import sys

    news, long = "It rained in Hobart. " * 12, "A long paragraph about ''whales''. " * 12
    (tmp_path / "lee_background.cor").write_text(f"{news}\nshort\n")
    name = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    (tmp_path / name).write_bytes(bz2.compress(b"pages"))
    fake = SimpleNamespace(
        extract_pages=lambda _file, _spaces: [("Whale", f"== Whale ==\n{long}\n| table {long}\nshort", "1")],
        filter_wiki=lambda text: text,
    )
    modules: dict[str, Any] = dict.fromkeys(("gensim", "gensim.corpora"), SimpleNamespace())
    for module, value in {**modules, "gensim.corpora.wikicorpus": fake}.items():
        monkeypatch.setitem(sys.modules, module, value)
    monkeypatch.setattr(general, "_folder", lambda: tmp_path)
    found = general.general_text()
    assert isinstance(found, CalibrationSet)
    assert found.documents == (news.strip(), long.replace("''", "").strip())
