"""Multiple choice against log-likelihoods computed by hand, whatever the batch, and every wrong line by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny
from sglp_deploy.errors import CalibrationError, ConfigError, UnsupportedModelError
from sglp_deploy.tasks.continuations import Continuation, Encoder, score_continuations
from sglp_deploy.tasks.multiple_choice import MultipleChoice, Question

QUESTIONS = (
    ("Where do fish live?", ["in water", "in the wide and very dry desert", "up"], 0),
    ("A cat says", ["woof", "meow"], "meow"),
    ("To open a door, ", ["push it", "paint it in a bright colour and wait"], 1),
)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.model("llama")


def write(folder: Path, *records: Any, name: str = "things.jsonl") -> str:
    file = folder / name
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(file)


def records() -> list[dict[str, Any]]:
    return [{"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS]


def by_hand(model: PreTrainedModel, context: str, continuation: str) -> float:
    """Sum of log softmax at each byte of ``continuation``: the tokenizer of the tests has one token for each byte."""
    tokens = tiny.tokenizer()(context + continuation, add_special_tokens=False)["input_ids"]
    first = len(context.encode())
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double().tolist()
    total = 0.0
    for position in range(first, len(tokens)):
        row = logits[position - 1]
        highest = max(row)
        total += row[tokens[position]] - highest - math.log(sum(math.exp(value - highest) for value in row))
    return total


def test_the_choice_is_the_one_of_the_highest_log_likelihood_computed_by_hand(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    scores = MultipleChoice.read(write(tmp_path, *records())).scores(llama, tiny.tokenizer())
    raw, normed = [], []
    for text, choices, answer in QUESTIONS:
        right = answer if isinstance(answer, int) else choices.index(answer)
        # Whoever wrote the space, it is judged with the choice.
        found = [by_hand(llama, text.rstrip(), f" {choice}") for choice in choices]
        raw.append(float(max(range(len(choices)), key=found.__getitem__) == right))
        per_character = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
        normed.append(float(max(range(len(choices)), key=per_character.__getitem__) == right))
    assert scores.values["acc"].tolist() == raw
    assert scores.values["acc_norm"].tolist() == normed
    assert raw != normed  # or the two rules would not be told apart here
    assert scores.metric == "acc_norm"
    assert scores.facts["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert scores.n_items == 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_likelihoods_are_those_of_the_definition_at_every_batch_size(
    llama: PreTrainedModel, batch_size: int
) -> None:
    pairs = [("Hello", " world"), ("A much longer beginning of a sentence", " x"), ("B", " and so on and on and on")]
    encoder = Encoder(llama, tiny.tokenizer())
    rows = [encoder.encode(*pair, "here") for pair in pairs]
    seen: list[tuple[int, int]] = []
    found, _ = score_continuations(
        llama, rows, batch_size=batch_size, progress=lambda done, total: seen.append((done, total))
    )
    assert found == pytest.approx([by_hand(llama, *pair) for pair in pairs], rel=1e-5)
    assert seen == [(min(done, 3), 3) for done in range(batch_size, 3 + batch_size, batch_size)]


def test_what_stands_in_the_padding_changes_nothing(llama: PreTrainedModel) -> None:
    """The shorter row alone, and beside a longer one of other content."""
    short = Continuation(tuple(b"abc defg"), 4)
    alone, _ = score_continuations(llama, [short])
    for longer in (b"something quite long indeed", b"XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX"):
        beside, _ = score_continuations(llama, [short, Continuation(tuple(longer), 10)])
        assert beside[0] == pytest.approx(alone[0], rel=1e-6)


def test_greedy_means_that_every_token_is_the_most_probable_one(llama: PreTrainedModel) -> None:
    ids = list(b"Some words")
    for _ in range(4):
        with torch.inference_mode():
            ids.append(int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 256]
    _, greedy = score_continuations(llama, [Continuation(tuple(ids), 10), Continuation(tuple(wrong), 10)])
    assert greedy.tolist() == [True, False]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, the space, and " y" and "zy" as one token each."""
    symbols = ["Ġ", *"abcxyz", "Ġy", "zy", "<bos>"]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[("Ġ", "y"), ("z", "y")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


def test_the_boundary_is_tokenized_as_one_text(llama: PreTrainedModel) -> None:
    encoder = Encoder(llama, merging_tokenizer())
    # x=4, " y" is one token: it belongs to the continuation whichever side the space stood on.
    assert encoder.encode("x", " y", "here") == Continuation((4, 7), 1)
    assert encoder.encode("x ", "y", "here") == Continuation((4, 7), 1)
    # "zy" merges across the boundary: the text keeps its own token, and the continuation has what is beyond its number.
    with pytest.raises(ConfigError) as caught:
        encoder.encode("z", "y", "things.jsonl line 9")
    assert str(caught.value) == (
        "things.jsonl line 9: the words that are judged have no token of their own; nothing can be scored; change the "
        "line"
    )
    assert encoder.encode("z", "yx", "here") == Continuation((6, 4), 1)


def test_the_begin_token_comes_first_where_the_tokenizer_adds_it(llama: PreTrainedModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 9)])
    assert Encoder(llama, tokenizer).encode("x", " y", "here") == Continuation((9, 4, 7), 2)


def test_a_space_goes_between_unless_one_is_there() -> None:
    def between(text: str, choice: str) -> str:
        return Question(text, (choice, "b"), 0, "here").continuation(choice)

    assert between("Is it?", "yes") == " yes"
    assert between("Is it? ", "yes") == "yes"
    assert between("Is it?\n", "yes") == "yes"
    assert between("Is it?", " yes") == " yes"


WRONG = [
    ({"question": "q", "choices": ["a", "b"]}, "has no answer; a question needs question, choices, answer; rename"),
    ({"choices": ["a", "b"]}, "has no question and no answer; a question needs question, choices, answer; rename"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, ": answer 2 is out of range; there are 2 choices, counted"),
    ({"question": "q", "choices": ["a", "b"], "answer": -1}, ": answer -1 is out of range; there are 2 choices, c"),
    ({"question": "q", "choices": ["a", "b"], "answer": "c"}, ": answer 'c' is no choice; give the text of one, or"),
    ({"question": "q", "choices": ["a", "a"], "answer": "a"}, ": answer 'a' is more than one choice; give the text"),
    ({"question": "q", "choices": ["a", "b"], "answer": True}, ": answer is True; a choice's number from 0, or its"),
    ({"question": "q", "choices": ["a", "b"], "answer": 0.0}, ": answer is 0.0; a choice's number from 0, or its"),
    ({"question": "q", "choices": ["a"], "answer": 0}, "has 1 choice; there is nothing to choose between; give two"),
    ({"question": "q", "choices": [], "answer": 0}, "has no choices; there is nothing to choose between; give two"),
    ({"question": "q", "choices": "ab", "answer": 0}, ": choices are 'ab'; a list of texts is read; change it"),
    ({"question": "q", "choices": ["a", 3], "answer": 0}, ": choices are ['a', 3]; a list of texts is read; change"),
    ({"question": " ", "choices": ["a", "b"], "answer": 0}, ": question is ' '; the choices continue a text; write"),
    (["q", ["a", "b"], 0], "is no object; question, choices, answer are read from it; write one object a line"),
]


@pytest.mark.parametrize(("record", "words"), WRONG)
def test_a_wrong_line_is_refused_by_its_number(record: Any, words: str, tmp_path: Path) -> None:
    file = write(tmp_path, records()[0], record)
    with pytest.raises(ConfigError) as caught:
        MultipleChoice.read(file)
    message = str(caught.value)
    assert message.startswith(f"{file} line 2")
    assert words in message


def test_a_line_that_is_not_json_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('\n{"question": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.jsonl line 2 is not JSON; Expecting value; one JSON object a"):
        MultipleChoice.read(str(file))
    file.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.jsonl is empty; there is nothing to judge by; one item a line"):
        MultipleChoice.read(str(file))


def test_only_the_first_lines_are_asked_when_there_is_a_limit(tmp_path: Path) -> None:
    file = write(tmp_path, *records(), {"question": "never read"})
    task = MultipleChoice.read(file, 2)
    assert [question.text for question in task.questions] == [text for text, _, _ in QUESTIONS[:2]]
    assert [question.answer for question in task.questions] == [0, 1]
    assert task.name == "things"


def test_a_question_longer_than_the_window_is_refused_by_its_line(llama: PreTrainedModel, tmp_path: Path) -> None:
    question = {"question": "long " * 50, "choices": ["a", "much longer than a"], "answer": 0}
    task = MultipleChoice.read(write(tmp_path, records()[0], question))
    with pytest.raises(ConfigError) as caught:
        task.scores(llama, tiny.tokenizer())
    # 249 letters without the last space, then a space and 18 letters.
    assert str(caught.value) == (
        f"{tmp_path}/things.jsonl line 2: 268 tokens do not fit the model's window of 256; cut off, it would be "
        "another question; leave the line out"
    )


def test_a_model_that_is_broken_is_refused_and_so_is_one_of_another_kind(tmp_path: Path) -> None:
    task = MultipleChoice.read(write(tmp_path, *records()))
    broken = tiny.model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match="the log-likelihood of an answer is not finite; the model's weights"):
        task.scores(broken, tiny.tokenizer())
    with pytest.raises(UnsupportedModelError, match="has no next-token loss to measure by"):
        task.scores(torch.nn.Linear(2, 2), tiny.tokenizer())


def test_the_digest_is_of_what_is_asked(llama: PreTrainedModel, tmp_path: Path) -> None:
    def digest(*given: Any, name: str, limit: int | None = None) -> Any:
        return MultipleChoice.read(write(tmp_path, *given, name=name), limit).scores(llama, tiny.tokenizer()).facts

    first = digest(records()[0], name="one.jsonl")
    assert first["source"].endswith("one.jsonl")
    assert digest(*records(), name="other.jsonl", limit=1)["digest"] == first["digest"]
    assert digest({**records()[0], "answer": 1}, name="one.jsonl")["digest"] != first["digest"]
    assert np.isfinite(first["chance"])
