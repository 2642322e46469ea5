"""The last word of a passage: what it is, when it counts as told, and which lines are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from sglp_deploy.errors import ConfigError
from sglp_deploy.tasks.last_word import LastWord, Passage


def write(folder: Path, text: str, name: str = "passages.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_accuracy_counts_the_passages_whose_word_comes_out(tmp_path: Path) -> None:
    """A model that always writes "a" after a space and ends words by a space."""
    model, tokenizer = tiny.model("llama-untied"), tiny.tokenizer()
    letter, space = tokenizer("a")["input_ids"][0], tokenizer(" ")["input_ids"][0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.zeros_like(model.model.embed_tokens.weight)
        embedding[:, 0] = 1.0  # after anything else: the space
        embedding[space] = 0.0
        embedding[space, 1] = 1.0  # after the space: the letter
        model.model.embed_tokens.weight.copy_(embedding)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[space, 0] = 1.0
        model.lm_head.weight[letter, 1] = 1.0
    file = write(tmp_path, "He gave her a.\nHe gave her b.\nHe gave her aa\n")
    scores = LastWord.read(file).scores(model, tokenizer)
    # "aa" is right in its first letter only, and every token must be.
    assert scores.values["acc"].tolist() == [1.0, 0.0, 0.0]
    assert scores.facts["kind"] == "last-word"
    assert scores.metric == "acc"


def test_punctuation_after_the_last_word_is_left_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = write(tmp_path, 'She said: "Go  home!"\n\nIt was 3.5\n')
    assert LastWord.read(file).passages == (
        Passage('She said: "Go  ', "home", f"{file} line 1"),
        Passage("It was ", "3.5", f"{file} line 3"),
    )


def test_json_lines_have_the_key_text_and_a_passage_may_hold_line_breaks(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps({"text": "first line\nand the end"}) + "\n", "lambada.jsonl")
    task = LastWord.read(file)
    assert task.passages == (Passage("first line\nand the ", "end", f"{file} line 1"),)
    assert task.name == "lambada"


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("p.txt", "alone.", "has fewer than two words; the last is told from the others; leave the line out"),
        ("p.txt", " ... ", "has fewer than two words; the last is told from the others; leave the line out"),
        ("p.jsonl", '{"words": "a b"}', "has no text; the key text was expected; rename the key"),
        ("p.jsonl", "a b", "is not JSON; Expecting value; one JSON object a line is read"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(name: str, line: str, words: str, tmp_path: Path) -> None:
    good = '{"text": "one two"}' if name.endswith("jsonl") else "one two"
    file = write(tmp_path, f"{good}\n{line}\n", name)
    with pytest.raises(ConfigError) as caught:
        LastWord.read(file)
    assert str(caught.value) == f"{file} line 2 {words}"
    assert len(LastWord.read(file, 1).passages) == 1
