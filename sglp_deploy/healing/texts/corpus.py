"""What a model is healed on: a mix of texts in equal shares, each with rows kept back to judge by.

One text alone overfits: trained on one kind of prose, the pruned model forgets the others
(docs/decisions/0012-healing-on-a-mix.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.text import BUILTIN, CalibrationSet
from sglp_deploy.healing.texts.general import general_text
from sglp_deploy.healing.texts.parts import GENERAL, WRITTEN, Part
from sglp_deploy.healing.texts.written import written_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglp_deploy.healing.options import HealOptions
    from sglp_deploy.models import LoadedModel

# Muennighoff et al. (arXiv:2305.16264): up to four passes over a text are worth about as much as new text.
MOST_EPOCHS: Final = 4
# Of one text, where no number of tokens bounds the training.
_MOST_TOKENS = 2_000_000
# Of a text's rows, at most this share is kept back.
_HELD_OUT_AT_MOST = 8

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of one text; all are of the same length, so nothing is padded.

    Attributes:
        name: Where the text came from, for people.
        rows: To train on (rows, sequence_length).
        held_out: To judge by (rows, sequence_length).
    """

    name: str
    rows: Rows
    held_out: Rows


@dataclass(frozen=True, eq=False)
class Mix:
    """Texts that are drawn from in turn.

    Attributes:
        shares: The texts.
        seed: Order of their rows.
        left_out: Parts of the default mix that were not at hand, and why, one sentence each.
    """

    shares: tuple[Share, ...]
    seed: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return int(self.shares[0].rows.shape[1])

    @property
    def held_out(self) -> Rows:
        """Rows that nothing is trained on, of all shares in order."""
        return np.concatenate([share.held_out for share in self.shares])

    @property
    def digest(self) -> str:
        """SHA-256 over every row and their order."""
        parts = [[_io.sha256_json([rows.shape, rows.tobytes().hex()]) for rows in (share.rows, share.held_out)]
                 for share in self.shares]  # fmt: skip
        return _io.sha256_json([parts, self.seed])

    def drawn(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Share and row of each draw from the ``start``-th on, without end; a function of the seed alone.

        The shares take turns.  One that has been gone through four times waits until all others have been.
        """
        return islice(self._draws(), start, None)

    def _draws(self) -> Iterator[tuple[int, int]]:
        epochs = [0] * len(self.shares)
        waiting: list[Iterator[int]] = [iter(()) for _ in self.shares]
        while True:
            fresh = [number for number in range(len(self.shares)) if epochs[number] <= MOST_EPOCHS]
            for number in fresh or range(len(self.shares)):
                row = next(waiting[number], None)
                if row is None:
                    if epochs[number] == MOST_EPOCHS and fresh:
                        epochs[number] += 1  # it has had its passes, and waits
                        continue
                    order = np.random.default_rng([self.seed, number, epochs[number]])
                    waiting[number] = iter(order.permutation(len(self.shares[number].rows)).tolist())
                    epochs[number] += 1
                    row = next(waiting[number])
                yield number, row

    def facts(self) -> list[dict[str, Any]]:
        """What a plan records: name, training and held-out tokens of each share."""
        return [
            {"source": share.name, "n_tokens": int(share.rows.size), "n_held_out": int(share.held_out.size)}
            for share in self.shares
        ]


def mix_of(
    parts: Sequence[Part],
    loaded: LoadedModel,
    options: HealOptions,
    *,
    optional: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Mix:
    """Rows of every part, the last ones of each held out.

    Args:
        parts: Texts, or the names "builtin", "general" and "written".
        loaded: The unpruned model and its tokenizer.
        options: Length of the rows, how many are held out, the budget, the seed.
        optional: Whether "general" is left out where its package is missing; else it is an error.
        progress: Called with (stage, done, in all).

    Raises:
        CalibrationError: If a text gives less than two rows.
        ConfigError: If the package of "general" is missing.
    """
    kept_back = max(1, options.held_out // options.sequence_length // max(1, len(parts)))
    most = min(options.tokens or _MOST_TOKENS, _MOST_TOKENS) + (kept_back + 1) * options.sequence_length
    shares, left_out = [], []
    for part in parts:
        if part == GENERAL:
            found = general_text()
            if isinstance(found, str):
                if not optional:
                    raise CalibrationError(found)
                left_out.append(found)
                continue
            part = found
        elif part == BUILTIN:
            part = CalibrationSet.builtin()
        elif part == WRITTEN:
            part = written_text(loaded, options, progress)
        assert isinstance(part, CalibrationSet)
        rows = _full_rows(part, loaded, options, most)
        held_out = min(kept_back, max(1, len(rows) // _HELD_OUT_AT_MOST))
        shares.append(Share(part.source, rows[:-held_out], rows[-held_out:]))
    return Mix(tuple(shares), options.seed, tuple(left_out))


def _full_rows(part: CalibrationSet, loaded: LoadedModel, options: HealOptions, most: int) -> Rows:
    length = options.sequence_length
    whole = CalibrationSet(part.documents, part.source, most, length, options.batch_size, options.seed)
    batches = whole.encode(loaded.tokenizer)
    full = batches.attention_mask.all(1) & (batches.input_ids.shape[1] == length)
    rows: Rows = batches.input_ids[full]
    if len(rows) < 2:
        raise CalibrationError(
            f"{part.source} gives {batches.n_tokens} tokens, which fill {len(rows)} rows of {length}; healing trains "
            "on some rows and is judged on others; give more text, or a smaller sequence_length"
        )
    return rows
