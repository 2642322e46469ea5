"""Multiple choice from JSON lines: the model's answer is the choice it finds most probable after the question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sglp_deploy import _io
from sglp_deploy.errors import ConfigError
from sglp_deploy.evidence.json_lines import value_of
from sglp_deploy.tasks.asked import CHOICE, read_lines
from sglp_deploy.tasks.scores import Scores

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sglp_deploy.tasks.base import Progress

_KEYS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """One line.

    Attributes:
        text: What is asked; the choices continue it.
        choices: At least two.
        answer: Which of them is right, from 0.
        place: "FILE line 3".
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    place: str

    def continuation(self, choice: str) -> str:
        """What is scored after the question: the choice, a space before it unless either brings one."""
        apart = self.text[-1].isspace() or choice[:1].isspace()
        return choice if apart else f" {choice}"


@dataclass(frozen=True)
class MultipleChoice:
    """Questions of one file.

    Attributes:
        name: The file's, without its ending.
        source: The file.
        questions: Those that are asked.
    """

    name: str
    source: str
    questions: tuple[Question, ...]

    @classmethod
    def read(cls, path: str, limit: int | None = None) -> MultipleChoice:
        """The questions of a file: one object a line with ``question``, ``choices`` and ``answer``.

        Args:
            path: The file.
            limit: How many of the first lines; all when None.

        Raises:
            ConfigError: If the file is missing, unreadable or empty, or a line is wrong; the first such line is named.
        """
        lines = read_lines(path)[:limit]
        return cls(Path(path).stem, path, tuple(_question(line, f"{path} line {number}") for number, line in lines))

    def scores(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Scores:
        """Whether the right choice is the most probable one: by length (``acc_norm``), and as it is (``acc``).

        ``acc_norm`` divides the log-likelihood of a choice by its number of characters, as lm-eval does; otherwise the
        shortest choice would win too often.  Among equals the first is taken.

        Raises:
            ConfigError: If a question is longer than the model's window.
            CalibrationError: If a log-likelihood is not finite.
        """
        from sglp_deploy.tasks.continuations import Encoder, score_continuations

        model = cast("PreTrainedModel", module)
        encoder = Encoder(model, tokenizer)
        rows = [
            encoder.encode(question.text, question.continuation(choice), question.place)
            for question in self.questions
            for choice in question.choices
        ]
        found, _ = score_continuations(model, rows, batch_size=batch_size, progress=progress)
        raw, normed, start = [], [], 0
        for question in self.questions:
            likelihood = found[start : start + len(question.choices)]
            lengths = np.array([len(choice) for choice in question.choices])
            raw.append(float(likelihood.argmax() == question.answer))
            normed.append(float((likelihood / lengths).argmax() == question.answer))
            start += len(question.choices)
        return Scores(
            values={"acc_norm": np.array(normed), "acc": np.array(raw)},
            labels={"acc_norm": "accuracy, by length", "acc": "accuracy"},
            facts={
                "kind": CHOICE,
                "source": self.source,
                "digest": _io.sha256_json([[item.text, item.choices, item.answer] for item in self.questions]),
                "chance": float(np.mean([1 / len(question.choices) for question in self.questions])),
            },
        )


def _question(line: str, place: str) -> Question:
    record = value_of(line, place)
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is no object; {', '.join(_KEYS)} are read from it; write one object a line")
    if missing := [key for key in _KEYS if key not in record]:
        raise ConfigError(
            f"{place} has no {' and no '.join(missing)}; a question needs {', '.join(_KEYS)}; rename or add the key"
        )
    text, choices, answer = (record[key] for key in _KEYS)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{place}: question is {text!r}; the choices continue a text; write one")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ConfigError(f"{place}: choices are {choices!r}; a list of texts is read; change it")
    if len(choices) < 2:
        count = "1 choice" if choices else "no choices"
        raise ConfigError(f"{place} has {count}; there is nothing to choose between; give two or more")
    return Question(text, tuple(choices), _answer(answer, choices, place), place)


def _answer(answer: Any, choices: list[str], place: str) -> int:
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, str):
        why = "is no choice" if answer not in choices else "is more than one choice"
        raise ConfigError(f"{place}: answer {answer!r} {why}; give the text of one, or its number from 0")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ConfigError(f"{place}: answer is {answer!r}; a choice's number from 0, or its text, is read; change it")
    if not 0 <= answer < len(choices):
        raise ConfigError(
            f"{place}: answer {answer} is out of range; there are {len(choices)} choices, counted from 0; give 0 to "
            f"{len(choices) - 1}"
        )
    return answer
