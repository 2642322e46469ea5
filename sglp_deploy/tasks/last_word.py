"""Passages whose last word is to be told from the rest, as in LAMBADA (Paperno et al. 2016, arXiv:1606.06031)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from sglp_deploy import _io
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.documents import is_json_lines
from sglp_deploy.evidence.json_lines import value_of
from sglp_deploy.tasks.asked import read_lines
from sglp_deploy.tasks.scores import Scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress

KIND: Final = "last-word"
_AFTER_A_WORD: Final = " \t\r\n.,;:!?…\"'”’)]}»"


@dataclass(frozen=True)
class Passage:
    """One line: the text up to its last word, that word, and "FILE line 3"."""

    context: str
    word: str
    place: str


@dataclass(frozen=True)
class LastWord:
    """Passages of one file.

    Attributes:
        name: The file's, without its ending.
        source: The file.
        passages: Those that are asked.
    """

    name: str
    source: str
    passages: tuple[Passage, ...]

    @classmethod
    def read(cls, path: str, limit: int | None = None) -> LastWord:
        """The passages of a file: one a line, or JSON lines (``.jsonl``) with the key "text".

        Punctuation after the last word is left out.  What precedes it is kept as it is.

        Args:
            path: The file.
            limit: How many of the first lines; all when None.

        Raises:
            ConfigError: If the file is missing, unreadable or empty, or a line is wrong; the first such line is named.
        """
        passages = []
        lines = read_lines(path)[:limit]
        as_json = is_json_lines(path, lines[0][1])
        for number, line in lines:
            place = f"{path} line {number}"
            passages.append(_passage(_text(line, place) if as_json else line, place))
        return cls(Path(path).stem, path, tuple(passages))

    def scores(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Scores:
        """Whether greedy decoding writes the last word: each of its tokens is the most probable one.

        Raises:
            ConfigError: If a passage is longer than the model's window.
            CalibrationError: If a log-likelihood is not finite.
        """
        from sglp_deploy.tasks.continuations import Encoder, score_continuations

        model = cast("PreTrainedModel", module)
        encoder = Encoder(model, tokenizer)
        rows = [encoder.encode(passage.context, passage.word, passage.place) for passage in self.passages]
        _, greedy = score_continuations(model, rows, batch_size=batch_size, progress=progress)
        return Scores(
            values={"acc": greedy.astype("float64")},
            labels={"acc": "accuracy of the last word"},
            facts={
                "kind": KIND,
                "source": self.source,
                "digest": _io.sha256_json([[item.context, item.word] for item in self.passages]),
                "chance": None,
            },
        )


def _text(line: str, place: str) -> str:
    record = value_of(line, place)
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ConfigError(f"{place} has no text; the key text was expected; rename the key")
    return text


def _passage(text: str, place: str) -> Passage:
    body = text.rstrip(_AFTER_A_WORD)
    words = body.rsplit(None, 1)
    if len(words) < 2:
        raise ConfigError(f"{place} has fewer than two words; the last is told from the others; leave the line out")
    return Passage(body[: -len(words[1])], words[1], place)
