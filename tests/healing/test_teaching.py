"""What the teacher says of a row is computed once where the row comes again, and survives a break whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from sglp_deploy.errors import StorageError
from sglp_deploy.healing import teaching
from sglp_deploy.healing.losses import Speaker
from sglp_deploy.healing.options import HealOptions
from sglp_deploy.healing.teaching import Taught
from sglp_deploy.healing.texts.corpus import Mix, Share

TEXT = np.random.default_rng(0).integers(0, 250, size=(12, 16))
MIX = Mix((Share("small", TEXT[:4], TEXT[4:5]), Share("large", TEXT[5:11], TEXT[11:])))
OFTEN = HealOptions(minutes=1)


class Counting(Speaker):
    """Counts the rows it is asked for."""

    rows = 0

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """See :class:`Speaker`."""
        self.rows += len(ids)
        return super().states(ids)


def teacher(**changes: Any) -> Counting:
    return Counting(tiny.model("gemma3" if changes else "llama", **changes), torch.float32)


def ask(taught: Taught, *draws: tuple[int, int]) -> torch.Tensor:
    return taught.states(draws, torch.from_numpy(np.stack([MIX.shares[share].rows[row] for share, row in draws])))


def test_a_row_is_computed_once_and_found_again_by_another_process(tmp_path: Path) -> None:
    own = teacher()
    taught = Taught(own, MIX, OFTEN, tmp_path / "healing" / "x.taught")
    first = ask(taught, (0, 1), (1, 2))
    assert torch.equal(ask(taught, (1, 2), (0, 1)), first[[1, 0]])
    with torch.no_grad():
        expected = Speaker(own.module, torch.float32).states(torch.from_numpy(TEXT[[1, 7]]))
    assert torch.equal(first, expected)
    assert own.rows == 2
    mixed = ask(taught, (0, 3), (0, 1))
    assert own.rows == 3
    again = teacher()
    other = Taught(again, MIX, OFTEN, tmp_path / "healing" / "x.taught")
    assert torch.equal(ask(other, (0, 1), (1, 2)), first)
    assert torch.equal(ask(other, (0, 3), (0, 1)), mixed)
    assert again.rows == 0
    other.clear()
    assert [*(tmp_path / "healing").iterdir()] == []


def test_a_batch_that_was_not_written_whole_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "x.taught"
    first = ask(Taught(teacher(), MIX, OFTEN, file), (0, 0), (0, 1))
    size = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(b"half a row")
    own = teacher()
    taught = Taught(own, MIX, OFTEN, file)
    assert file.stat().st_size == size
    ask(taught, (0, 2))
    assert torch.equal(ask(taught, (0, 0), (0, 1)), first)
    assert own.rows == 1
    file.write_bytes(file.read_bytes()[:-1])  # what the index names is gone, so none of it is believed
    own = teacher()
    assert torch.equal(ask(Taught(own, MIX, OFTEN, file), (0, 0), (0, 1)), first)
    assert own.rows == 2


def test_only_rows_that_come_again_are_kept(tmp_path: Path) -> None:
    own = teacher()
    # 16 rows in all, eight of each share: two passes over the small one, less over the large one.
    taught = Taught(own, MIX, HealOptions(tokens=16 * 16), tmp_path / "x.taught")
    for _ in range(2):
        ask(taught, (0, 1), (1, 2))
    assert own.rows == 3
    once = Taught(own, MIX, HealOptions(tokens=16), tmp_path / "y.taught")
    assert (ask(once, (0, 1)), own.rows)[1] == 4
    assert not (tmp_path / "y.taught").exists()


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "MOST_BYTES", 3 * 4 * 16 * 64)
    own = teacher()
    taught = Taught(own, MIX, OFTEN, tmp_path / "x.taught")
    for _ in range(2):
        for row in range(4):
            ask(taught, (0, row))
    assert own.rows == 5
    assert (tmp_path / "x.taught").stat().st_size == 3 * 4 * 16 * 64


def test_logits_and_what_has_no_place_are_not_kept(tmp_path: Path) -> None:
    for taught in (
        Taught(capped := teacher(final_logit_softcapping=5.0), MIX, OFTEN, tmp_path / "x.taught"),
        Taught(plain := teacher(), MIX, OFTEN, None),
    ):
        for _ in range(2):
            ask(taught, (0, 1))
    assert (capped.rows, plain.rows) == (2, 2)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taught = Taught(teacher(), MIX, OFTEN, tmp_path / "x.taught")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="no space left on the device; free some space and run the same command"):
        ask(taught, (0, 1))
