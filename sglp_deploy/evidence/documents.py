"""A person's text file as documents: prose, or JSON lines of texts, questions with answers, or conversations."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.evidence.json_lines import value_of

# A document shorter than this says nothing about language (a stray heading).
MIN_CHARACTERS: Final = 20
# Tokens are made of so many characters at once: a file of one line may be as long as a library.
PIECE: Final = 1 << 18

logger = logging.getLogger(__name__)

_JSON_ENDINGS: Final = frozenset({".jsonl", ".json", ".ndjson", ".jsonlines"})
_TEXT_KEYS: Final = ("text", "content")
_CONVERSATION_KEYS: Final = ("messages", "conversations", "conversation", "chosen")
_QUESTION_KEYS: Final = ("instruction", "question", "query", "prompt", "problem")
_ANSWER_KEYS: Final = ("output", "answer", "response", "completion", "solution", "chosen")
_ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

# What came out of a pipe, which can be read once; whoever asks again in this process gets the same.
_read: dict[tuple[str, int, int], str] = {}


class Conversation(str):
    """Messages as one text, their contents one after the other; ``messages`` has them by role.

    A tokenizer with a chat template makes tokens of the messages; any other, of the text.
    """

    messages: tuple[Mapping[str, str], ...]

    def __new__(cls, messages: Sequence[Mapping[str, str]]) -> Conversation:
        """Of messages with the keys ``role`` and ``content``."""
        made = super().__new__(cls, "\n\n".join(message["content"] for message in messages))
        made.messages = tuple(messages)
        return made


def read_text(path: str | Path, what: str) -> str:
    """The text of a file or a pipe, without a byte order mark, lines ending with a line feed.

    Args:
        path: The file.
        what: What it is called in an error ("calibration text").

    Raises:
        ConfigError: If it is missing, unreadable or not UTF-8.
    """
    file = Path(path)
    try:
        status = file.stat()
        key = (str(path), status.st_dev, status.st_ino)
        if key in _read:
            return _read[key]
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{what} {file} cannot be read; {reason}; check the path") from error
    if not stat.S_ISREG(status.st_mode):
        _read[key] = text
    return text


def lines_of(text: str) -> list[tuple[int, str]]:
    """Lines that hold something, with their numbers from 1.

    Only a line feed ends a line.  JSON allows other separators (U+2028) inside a text.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def is_json_lines(path: str | Path, text: str) -> bool:
    """Whether a file holds JSON lines: by its name, or because its first line is a JSON object."""
    if _JSON_ENDINGS & {ending.lower() for ending in Path(path).suffixes}:
        return True
    first = next((line for _, line in lines_of(text[: 1 << 20])), "").strip()
    if not (first.startswith("{") and first.endswith("}")):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def documents_of(path: str | Path) -> list[str]:
    """The documents of a file.

    Prose is split at blank lines.  A JSON line is a text, or an object with one: ``text`` or ``content``; a question
    and its answer (``prompt`` and ``completion``, ``instruction``, ``input`` and ``output``); messages (``messages``,
    ``conversations``).  A file may also hold one JSON array of such objects.  Lines that leave their text empty
    are left out.

    Raises:
        ConfigError: If it is missing, unreadable, not UTF-8, not JSON where it says so, or none of its lines is known.
        CalibrationError: If it holds no text.
    """
    text = read_text(path, "calibration text")
    found = [*_of_records(_records(path, text))] if is_json_lines(path, text) else _paragraphs(text)
    if not found:
        raise CalibrationError(
            f"{path} holds no text; a plan needs tokens to measure the layers on; give a file with prose"
        )
    return found


def pieces(document: str) -> Iterator[str]:
    """A document in parts of at most :data:`PIECE` characters, cut in front of white space where there is some."""
    start = 0
    while len(document) - start > PIECE:
        end = start + PIECE
        cut = max(document.rfind(" ", start + 1, end), document.rfind("\n", start + 1, end))
        end = cut if cut > start else end
        yield document[start:end]
        start = end
    yield document[start:]


def as_written(document: str, tokenizer: Any) -> str:
    """A document as the model is given it: a conversation in its chat template, where there is one that takes it."""
    templated = in_template(document.messages, tokenizer) if isinstance(document, Conversation) else None
    return document if templated is None else templated


def in_template(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> str | None:
    """Messages as the tokenizer's chat template writes them; None where it has none, or the template refuses them."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # noqa: BLE001  # a template is its author's program: it may refuse a role, or fail
        logger.info("the chat template is not used: %s", error)
        return None


def _paragraphs(text: str) -> list[str]:
    blocks = [block.strip() for block in text.split("\n\n")]
    kept = [block for block in blocks if len(block) >= MIN_CHARACTERS]
    # A file of a few short lines is still text.
    return kept or ([text.strip()] if text.strip() else [])


def _records(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = lines_of(text)
    if lines and lines[0][1].lstrip().startswith("["):
        whole = value_of(text, str(path))
        yield from ((f"{path} item {number}", record) for number, record in enumerate(whole, 1))
        return
    for number, line in lines:
        place = f"{path} line {number}"
        yield place, value_of(line, place)


def _of_records(records: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for place, record in records:
        document = record if isinstance(record, str) else _document(record) if isinstance(record, dict) else None
        if document is None:
            keys = ", ".join(map(repr, list(record)[:8])) if isinstance(record, dict) else ""
            keys = f"its keys are {keys}" if keys else "it has no keys"
            raise ConfigError(
                f"{place} has no text; {keys}; texts are read from text or content, from a question with its answer "
                "(prompt and completion, instruction and output), or from messages; write one of these"
            )
        if document.strip():
            yield document


def _document(record: dict[str, Any]) -> str | None:
    """What an object says; empty where its text is left empty, None where nothing in it is known."""
    for key in _TEXT_KEYS:
        if isinstance(record.get(key), str):
            return str(record[key])
    if (prompt := _messages(record.get("prompt"))) is not None:
        return Conversation((*prompt, *(_messages(record.get("completion") or record.get("chosen")) or ())))
    for key in _CONVERSATION_KEYS:
        if (messages := _messages(record.get(key))) is not None:
            return Conversation(messages)
    question = next((record[key] for key in _QUESTION_KEYS if isinstance(record.get(key), str)), None)
    answer = next((record[key] for key in _ANSWER_KEYS if isinstance(record.get(key), str)), None)
    if isinstance(question, str) and answer is not None:
        if "prompt" in record and (question[-1:].isspace() or answer[:1].isspace()):
            return f"{question}{answer}"  # a text that was cut in two
        more = record.get("input")
        asked = f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question
        return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))
    if isinstance(question, str):
        return str(question)
    known = (*_TEXT_KEYS, *_CONVERSATION_KEYS, *_QUESTION_KEYS)
    return "" if any(key in record and not record[key] for key in known) else None


def _messages(value: Any) -> list[dict[str, str]] | None:
    """Messages by role and content, also those of ShareGPT ("from", "value"); None where it is no list of such."""
    if not isinstance(value, list) or not value:
        return None
    found = []
    for message in value:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which some may be images
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(text for text in texts if isinstance(text, str))
        if not isinstance(role, str):
            return None
        if isinstance(content, str):  # a call of a tool has none
            found.append({"role": _ROLES.get(role, role), "content": content})
    return found
