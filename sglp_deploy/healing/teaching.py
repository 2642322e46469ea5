"""What the teacher says of a row, computed once where the row will come again.

Kept is what the teacher's head is given, and not its most likely tokens: that is exact, and takes less room than the
logits of a few hundred tokens would.  A file holds it beside the state of the training.  So a resumed training reads
what an unbroken one would read, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from sglp_deploy import _io

if TYPE_CHECKING:
    from sglp_deploy.healing.losses import Speaker
    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.healing.texts.corpus import Mix

# On the disk, in all.
MOST_BYTES: Final = 1 << 30
_FLOAT: Final = 4

Draw = tuple[int, int]


class Taught:
    """The teacher's states by row.

    Args:
        teacher: Computes them.
        mix: Where the rows are from.
        options: Says how many rows will be drawn.
        file: Keeps them; an index lies beside it.  None keeps nothing.
    """

    def __init__(self, teacher: Speaker, mix: Mix, options: HealOptions, file: Path | None) -> None:
        self._teacher = teacher
        self._shape: tuple[int, ...] = ()
        self._file = file
        self._shares = _that_come_again(mix, options)
        self._places: dict[Draw, int] = {}
        # Logits, where the head cannot be told apart, are too wide to be kept.
        if file is None or not self._shares or not teacher.split:
            self._file = None
            return
        width = teacher.width
        self._shape = (mix.sequence_length, width)
        self._row_bytes = _FLOAT * mix.sequence_length * width
        self._room = MOST_BYTES // self._row_bytes
        self._open(file)

    def states(self, draws: Sequence[Draw], ids: torch.Tensor) -> torch.Tensor:
        """Of a batch; what is not there is computed, and kept where its row will come again.

        Raises:
            StorageError: If the disk is full.
        """
        missing = [at for at, draw in enumerate(draws) if draw not in self._places]
        with torch.no_grad():
            computed = self._teacher.states(ids[missing]) if missing else None
        if self._file is None:
            assert computed is not None
            return computed
        found = torch.empty((len(draws), *self._shape), device=ids.device)
        for at, draw in enumerate(draws):
            if draw in self._places:
                found[at] = self._read(self._file, self._places[draw]).to(ids.device)
        if computed is not None:
            found[missing] = computed.float()
            self._keep(self._file, [(draws[at], found[at]) for at in missing])
        return found

    def clear(self) -> None:
        """Nobody will read them again."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            _index(self._file).unlink(missing_ok=True)

    def _open(self, file: Path) -> None:
        """Find what an earlier process kept; a batch that it did not come to write whole is given up."""
        with _io.storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = _index(file).read_text().splitlines() if _index(file).is_file() and file.is_file() else []
            draws = [tuple(map(int, pair.split("/"))) for line in lines for pair in line.split()]
            have = file.stat().st_size // self._row_bytes if file.is_file() else 0
            if not draws or len(draws) > have:
                draws, _ = [], (file.write_bytes(b""), _index(file).write_text(""))
            with file.open("r+b") as opened:
                opened.truncate(len(draws) * self._row_bytes)
        self._places = {(draw[0], draw[1]): place for place, draw in enumerate(draws)}

    def _read(self, file: Path, place: int) -> torch.Tensor:
        count = self._row_bytes // _FLOAT
        values = np.fromfile(file, dtype=np.float32, count=count, offset=place * self._row_bytes)
        return torch.from_numpy(values.reshape(self._shape))

    def _keep(self, file: Path, made: Sequence[tuple[Draw, torch.Tensor]]) -> None:
        wanted = dict[Draw, torch.Tensor]()
        for draw, states in made:
            if draw[0] in self._shares and len(self._places) + len(wanted) < self._room:
                wanted.setdefault(draw, states)
        if not wanted:
            return
        with _io.storage_errors(file):
            with file.open("ab") as opened:
                for states in wanted.values():
                    states.cpu().contiguous().numpy().tofile(opened)
            # Afterwards and at once: a batch counts whole or not at all, wherever the process is killed.
            with _index(file).open("a") as index:
                index.write(" ".join(f"{share}/{row}" for share, row in wanted) + "\n")
        for draw in wanted:
            self._places[draw] = len(self._places)


def _index(file: Path) -> Path:
    return file.with_suffix(".rows")


def _that_come_again(mix: Mix, options: HealOptions) -> frozenset[int]:
    """Shares whose rows are drawn twice or more on average; all of them where only time bounds the training."""
    if options.tokens is None:
        return frozenset(range(len(mix.shares)))
    drawn = math.ceil(options.tokens / mix.sequence_length) / len(mix.shares)
    return frozenset(number for number, share in enumerate(mix.shares) if drawn >= 2 * len(share.rows))
