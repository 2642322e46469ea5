"""Greedy samples against a plain loop, repetition against counting by hand, and what a family's generate() may do."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from sglp_deploy.materialize import select_layers
from sglp_deploy.tasks.both import sampled
from sglp_deploy.tasks.generation import PROMPTS, beside, distinct, greedy_sample, mean_repetition, repetition

END = 258


def plain_loop(model: PreTrainedModel, prompt: str, n_tokens: int) -> list[int]:
    """The most probable token, again and again, without a cache, up to the end-of-text token."""
    ids = tiny.tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    written: list[int] = []
    while len(written) < n_tokens and END not in written:
        with torch.inference_mode():
            written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_sample_is_what_a_plain_loop_writes(family: str) -> None:
    model = tiny.model(family)
    rows = greedy_sample(model, tiny.tokenizer(), 12)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    for row in rows:
        expected = plain_loop(model, row["prompt"], 12)
        assert row["text"] == tiny.tokenizer().decode(expected, skip_special_tokens=True)
        assert row["n_tokens"] == len(expected)
        assert row["repetition"] == repetition(expected)


def test_settings_of_generation_that_the_model_brings_change_nothing_and_are_put_back() -> None:
    model = tiny.model("llama")
    expected = greedy_sample(model, tiny.tokenizer(), 10)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens, own.num_beams = 50.0, 1, 9, 3
    assert greedy_sample(model, tiny.tokenizer(), 10) == expected
    assert model.generation_config is own
    assert own.do_sample is True


def test_a_sample_ends_with_the_end_of_text_token() -> None:
    model = tiny.model("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all logits are equal, so the first token wins: make the end token first
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB_SIZE))
        model.lm_head.bias[END] = 1.0
    row = greedy_sample(model, tiny.tokenizer(), 10, prompts=("x",))[0]
    assert (row["text"], row["n_tokens"], row["repetition"], row["distinct_1"]) == ("", 1, None, 1.0)


def test_repetition_is_the_share_of_runs_of_four_tokens_that_stood_there_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0.0
    # 1234 2341 3412 4123 1234: five runs, the last one known.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([9] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) is None
    assert distinct([1, 2, 1, 2], 1) == 0.5
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([], 1) is None


def test_two_models_stand_side_by_side_with_their_mean_repetition() -> None:
    dense = tiny.model("llama")
    pruned = select_layers(dense, (0, 2, 5))
    left, right = (greedy_sample(model, tiny.tokenizer(), 16) for model in (dense, pruned))
    found = beside(left, right, 16)
    assert found["decoding"] == "greedy, up to 16 tokens"
    assert [row["prompt"] for row in found["rows"]] == list(PROMPTS)
    assert found["rows"][0]["dense"] == {key: value for key, value in left[0].items() if key != "prompt"}
    assert found["rows"][3]["pruned"]["text"] == right[3]["text"]
    assert left != right
    mean = sum(row["repetition"] for row in left) / len(left)
    assert found["repetition"] == {"dense": pytest.approx(mean), "pruned": mean_repetition(right), "n": 4}


def test_samples_that_are_too_short_are_left_out_of_the_mean() -> None:
    assert mean_repetition([{"repetition": None}, {"repetition": 0.5}]) == 0.5
    assert mean_repetition([{"repetition": None}]) is None


def test_a_sample_that_cannot_be_made_says_why_and_stops_nothing() -> None:
    model = tiny.model("llama")
    found = sampled(model, torch.nn.Linear(2, 2), tiny.tokenizer(), 4, lambda name: None)
    assert found.keys() == {"not_made"}
    assert found["not_made"].startswith("UnsupportedModelError: Linear has no next-token loss to measure by")
    assert "has no tokenizer; tasks and samples are text" in sampled(model, model, None, 4, lambda _: None)["not_made"]
