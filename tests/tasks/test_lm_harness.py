"""lm-eval on local files: the same answers as our own multiple choice gives, and its failures in one line."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import tiny
from sglp_deploy.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from sglp_deploy.materialize import select_layers
from sglp_deploy.tasks import lm_harness
from sglp_deploy.tasks.asked import name_of, needs_connection, read_tasks
from sglp_deploy.tasks.lm_harness import HarnessTask
from sglp_deploy.tasks.multiple_choice import MultipleChoice
from sglp_deploy.tasks.scores import paired

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (the extra eval)")
SENTENCE = "the cat sat on a mat and looked at two small birds near some old trees while rain fell"
TASK = """
task: made_up
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A task file and its data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(1)

    def phrase(least: int, most: int) -> str:
        return " ".join(rng.choices(SENTENCE.split(), k=rng.randint(least, most)))

    data = tmp_path / "questions.jsonl"
    questions = [
        {
            "question": f"Question: {phrase(4, 8)}\nAnswer:",
            "choices": [phrase(1, 6) for _ in range(3)],
            "answer": rng.randrange(3),
        }
        for _ in range(24)
    ]
    data.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    task = tmp_path / "quiz.yaml"
    task.write_text(TASK.format(file=data))
    return task, data


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of lm-eval and of what it imports
def test_the_harness_and_our_own_multiple_choice_give_the_same_answers(
    files: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    task, data = files
    dense = tiny.model("llama")
    pruned = select_layers(dense, (0, 2, 3, 5))
    (asked,) = read_tasks([f"lm-eval:{task}"])
    own = MultipleChoice.read(str(data))
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    random.seed(5)
    expected = random.Random(5).random()
    scores = {}
    for name, module in (("dense", dense), ("pruned", pruned)):
        scores[name] = asked.scores(module, tokenizer)
        for metric, values in own.scores(module, tokenizer).values.items():
            assert scores[name].values[metric].tolist() == values.tolist()
            assert 0 < values.sum() < 24
    assert tokenizer.pad_token is None
    assert random.random() == expected
    assert capfd.readouterr().out == ""
    found = paired(scores["dense"], scores["pruned"])
    assert (asked.name, found["kind"], found["metric"], found["n_items"]) == ("quiz", "lm-eval", "acc_norm", 24)
    assert found["version"].startswith("lm-eval 0.4.")
    assert found["n_shots"] == 0
    few = HarnessTask.read(str(task), 5).scores(dense, tokenizer)
    assert few.values["acc"].tolist() == scores["dense"].values["acc"].tolist()[:5]


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_a_task_nobody_knows_and_data_that_are_not_there_are_refused_in_one_line(files: tuple[Path, Path]) -> None:
    task, data = files
    data.unlink()
    with pytest.raises(ConfigError) as caught:
        HarnessTask.read(str(task)).scores(tiny.model("llama"), tiny.tokenizer())
    assert str(caught.value).startswith(f"lm-eval:{task} cannot be asked; ")
    assert str(caught.value).endswith("; check the name and the connection, or give a task file that names local data")
    with pytest.raises(ConfigError, match="lm-eval:no_such_task_at_all cannot be asked; "):
        HarnessTask.read("no_such_task_at_all").scores(tiny.model("llama"), tiny.tokenizer())


def test_without_lm_eval_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        read_tasks(["lm-eval:hellaswag"])
    assert str(caught.value) == (
        "lm-eval:hellaswag needs lm-eval; it is not installed; pip install 'sglp-deploy[eval]', or give questions as "
        "JSON lines, which need nothing"
    )


def test_a_task_file_that_is_missing_and_a_model_of_another_kind_are_refused(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: object())
    with pytest.raises(
        ConfigError, match=r"task file /nowhere/x\.yaml cannot be read; No such file or directory; check"
    ):
        HarnessTask.read("/nowhere/x.yaml")
    import torch

    with pytest.raises(UnsupportedModelError, match="has no next-token loss to measure by"):
        HarnessTask.read(str(files[0])).scores(torch.nn.Linear(2, 2), tiny.tokenizer())


def test_metrics_without_a_number_for_each_item_are_left_out() -> None:
    def item(number: int, **values: object) -> dict[str, object]:
        return {"doc_id": number, "filter": "none", "doc_hash": "d", "target_hash": "t", "metrics": [*values], **values}

    task = HarnessTask("t", "t", None)
    facts = {"higher_is_better": {"t": {"word_nats": False}}, "configs": {"t": {}}, "versions": {"t": 1}}
    both = [item(1, pair=(1.0, 2), word_nats=2.5, exact=True), item(0, pair=(1.0, 2), word_nats=1.5, exact=False)]
    if find_spec("lm_eval"):
        scores = task._scores({**facts, "samples": {"t": both}})
        assert {name: values.tolist() for name, values in scores.values.items()} == {
            "word_nats": [1.5, 2.5],
            "exact": [0.0, 1.0],
        }
        assert scores.lower_is_better == {"word_nats"}
    with pytest.raises(ConfigError, match="lm-eval:t has no metric that is a number for each item; two models could"):
        task._scores({**facts, "samples": {"t": [item(0, pair=(1.0, 2)), item(1, pair=(np.nan, 2))]}})


def test_what_a_task_is_called_and_whether_it_may_need_a_connection() -> None:
    assert [name_of(request) for request in ("lm-eval:arc.easy", "lm-eval:a/quiz.yaml", "last-word:a/b.txt")] == [
        "arc.easy", "quiz", "b",
    ]  # fmt: skip
    assert [needs_connection(request) for request in ("lm-eval:hellaswag", "lm-eval:a/quiz.yaml", "a.jsonl")] == [
        True, False, False,
    ]  # fmt: skip
