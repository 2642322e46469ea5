"""Text that a model is measured on, and text kept back to judge the result; neither needs a download.

The default is the prose of CPython's own language reference (``pydoc_data.topics``).  It lies on every machine that has
Python.  It is split by topic into calibration and held-out text.  So a plan is never judged on what it was made from.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglp_deploy import _io
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.documents import MIN_CHARACTERS, as_written, documents_of, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin"
# One topic in four is held out; the share is by count of topics, decided by a hash of the topic's name.
_HELD_OUT_SHARE = 4


@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Token rows ready for a model.

    Attributes:
        input_ids: shape (rows, sequence_length), int64; the last row may be padded on the right.
        attention_mask: 1 for a token, 0 for padding, same shape.
        batch_size: Rows that go through the model together.
        digest: SHA-256 of ids and mask: two sets with equal digests are the same input.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    batch_size: int
    digest: str

    @property
    def n_samples(self) -> int:
        """Rows."""
        return int(self.input_ids.shape[0])

    @property
    def n_tokens(self) -> int:
        """Tokens, padding excluded."""
        return int(self.attention_mask.sum())

    def __len__(self) -> int:
        return -(-self.n_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for start in range(0, self.n_samples, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.input_ids[rows], self.attention_mask[rows]


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Documents, or token rows, and how many of their tokens to use.

    Attributes:
        documents: Texts, or arrays of token ids; never both kinds.
        source: Where they came from, for people.
        max_tokens: Token budget; documents are drawn in an order fixed by ``seed`` until it is met.
        sequence_length: Tokens in a row.
        batch_size: Rows that go through the model together.
        seed: Order of the documents.
    """

    documents: tuple[str, ...] | tuple[NDArray[np.int64], ...]
    source: str
    max_tokens: int = 16_384
    sequence_length: int = 256
    batch_size: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name}={getattr(self, name)} must be at least {least}"
            for name, least in (("max_tokens", 8), ("sequence_length", 8), ("batch_size", 1))
            if getattr(self, name) < least
        ]
        if faults:
            raise ConfigError(faults)
        if not self.documents:
            raise CalibrationError(
                f"{self.source} holds no text; a plan needs tokens to measure the layers on; give a file with prose"
            )

    @classmethod
    def builtin(cls, **options: Any) -> CalibrationSet:
        """The calibration share of CPython's own reference prose; ``options`` are the fields of this class."""
        return cls(_builtin_documents(held_out=False), f"{BUILTIN}:calibration", **options)

    @classmethod
    def builtin_held_out(cls, **options: Any) -> CalibrationSet:
        """The held-out share of the same prose, for judging quality."""
        return cls(_builtin_documents(held_out=True), f"{BUILTIN}:held-out", **options)

    @classmethod
    def from_text(cls, path: str | Path, **options: Any) -> CalibrationSet:
        """A file of prose or JSON lines; see :func:`sglp_deploy.evidence.documents.documents_of`.

        Raises:
            ConfigError: If the file is missing, unreadable, not UTF-8, or none of its JSON lines is known.
            CalibrationError: If it holds no text.
        """
        return cls(tuple(documents_of(path)), str(Path(path)), **options)

    @classmethod
    def from_dataset(cls, name: str, *, split: str = "train", column: str = "text", **options: Any) -> CalibrationSet:
        """A Hugging Face dataset, streamed; needs the ``data`` extra and a connection.

        Args:
            name: Dataset id, with ``:config`` after it for a configuration ("wikitext:wikitext-2-raw-v1").
            split: Split to read.
            column: Column that holds the text.
            options: Fields of this class.

        Raises:
            ConfigError: If ``datasets`` is missing or the dataset cannot be read.
        """
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                f"dataset {name!r} needs the datasets package; it is not installed; pip install datasets"
            ) from None
        repository, _, configuration = name.partition(":")
        wanted = options.get("max_tokens", cls.max_tokens) * 8  # characters: ample for any tokenizer
        documents: list[str] = []
        characters = 0
        try:
            for row in datasets.load_dataset(repository, configuration or None, split=split, streaming=True):
                text = str(row[column])
                if len(text.strip()) >= MIN_CHARACTERS:
                    documents.append(text)
                    characters += len(text)
                if characters >= wanted:
                    break
        except Exception as error:  # datasets raises its own, urllib's, fsspec's and builtin errors
            raise ConfigError(
                f"dataset {name!r} cannot be read; {str(error).splitlines()[0]}; check the id and the connection, or "
                "give a text file"
            ) from error
        return cls(tuple(documents), f"dataset:{name}:{split}", **options)

    @classmethod
    def from_token_ids(cls, rows: Sequence[NDArray[np.int64]], **options: Any) -> CalibrationSet:
        """Token ids that are already there, one array for each document; for models without a tokenizer."""
        return cls(tuple(np.asarray(row, dtype=np.int64) for row in rows), "token ids", **options)

    @classmethod
    def parse(cls, given: str | None, **options: Any) -> CalibrationSet:
        """What a user means: nothing (built-in), a path, or a dataset id written ``hf:NAME[:CONFIG]``."""
        if given is None or given == BUILTIN:
            return cls.builtin(**options)
        if given.startswith("hf:"):
            return cls.from_dataset(given.removeprefix("hf:"), **options)
        return cls.from_text(given, **options)

    def facts(self, batches: TokenBatches) -> dict[str, Any]:
        """What a plan records of it: the digest of its rows, where they came from, and their length."""
        return {"digest": batches.digest, "source": self.source, "sequence_length": self.sequence_length}

    def at_most(self, positions: int | None) -> CalibrationSet:
        """The same in rows that a model with so many positions takes; as it is when None or when they fit."""
        if positions is None or self.sequence_length <= positions:
            return self
        return replace(self, sequence_length=positions)

    def resized(self, max_tokens: int) -> CalibrationSet:
        """The same documents with another token budget."""
        return replace(self, max_tokens=max_tokens)

    def encode(self, tokenizer: PreTrainedTokenizerBase | None) -> TokenBatches:
        """Cut the documents into token rows.

        Documents follow one another, separated by the end-of-text token.  A row starts with the begin-of-text token
        when the tokenizer normally adds one: some models (Gemma) compute nonsense without it.

        Raises:
            CalibrationError: If there is text but no tokenizer, or too few tokens for one useful row.
        """
        rng = random.Random(self.seed)
        order = list(range(len(self.documents)))
        rng.shuffle(order)
        first = row_start(tokenizer) if tokenizer is not None and isinstance(self.documents[0], str) else []
        stream: list[int] = []
        for index in order:
            document = self.documents[index]
            if isinstance(document, str):
                if tokenizer is None:
                    raise CalibrationError(
                        f"{self.source} is text, but the model has no tokenizer; add tokenizer files to the model's "
                        "folder, or pass CalibrationSet.from_token_ids"
                    )
                for piece in pieces(as_written(document, tokenizer)):
                    stream.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
                    if len(stream) >= self.max_tokens:
                        break
                if tokenizer.eos_token_id is not None:
                    stream.append(tokenizer.eos_token_id)
            else:
                stream.extend(int(token) for token in document)
            if len(stream) >= self.max_tokens:
                break
        return _rows(stream[: self.max_tokens], first, self)


def _rows(stream: list[int], first: list[int], settings: CalibrationSet) -> TokenBatches:
    body = settings.sequence_length - len(first)
    chunks = [first + stream[start : start + body] for start in range(0, len(stream), body)]
    # A tail of a few tokens is noise; the only row there is is kept whatever its length.
    if len(chunks) > 1 and len(chunks[-1]) < settings.sequence_length // 4:
        chunks.pop()
    if not chunks or len(chunks[0]) < 8:
        raise CalibrationError(
            f"{settings.source} gives {len(stream)} tokens; similarity needs at least 8 in a row; give more text"
        )
    width = max(map(len, chunks))
    ids = np.zeros((len(chunks), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, chunk in enumerate(chunks):
        ids[row, : len(chunk)] = chunk
        mask[row, : len(chunk)] = 1
    digest = hashlib.sha256(repr(ids.shape).encode() + ids.tobytes() + mask.tobytes()).hexdigest()
    return TokenBatches(ids, mask, settings.batch_size, digest)


def row_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-text token where the tokenizer normally adds one, else nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _builtin_documents(*, held_out: bool) -> tuple[str, ...]:
    from pydoc_data.topics import topics

    held: list[str] = []
    rest: list[str] = []
    for name in sorted(topics):
        is_held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _HELD_OUT_SHARE == 0
        (held if is_held else rest).append(topics[name].strip())
    if held_out:
        return tuple(dict.fromkeys(held))
    # Some topics repeat paragraphs of others, or are the same text under another name; none may be on both sides.
    known = {_squeezed(paragraph) for document in held for paragraph in document.split("\n\n")}
    own = (
        "\n\n".join(paragraph for paragraph in document.split("\n\n") if _squeezed(paragraph) not in known)
        for document in rest
    )
    return tuple(dict.fromkeys(document for document in own if len(document) >= MIN_CHARACTERS))


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def builtin_digest() -> str:
    """Digest of the built-in prose; it changes with the Python version, so it is recorded."""
    return _io.sha256_json([_builtin_documents(held_out=False), _builtin_documents(held_out=True)])
