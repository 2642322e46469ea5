"""Perplexity against a plain loop, padding and chunk independence, and the paired interval of the ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import tiny
from sglp_deploy.errors import CalibrationError
from sglp_deploy.evidence.text import CalibrationSet, TokenBatches
from sglp_deploy.materialize import select_layers
from sglp_deploy.tasks.language import Perplexity, perplexity, quality_report, summary


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.model("llama")


def rows_of(lengths: tuple[int, ...], *, batch_size: int = 2, left: bool = False) -> TokenBatches:
    """Random token rows of these lengths, padded with an ordinary token so that only the mask tells."""
    rng = np.random.default_rng(3)
    ids = np.full((len(lengths), max(lengths)), 65, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(max(lengths) - length, None) if left else slice(length)
        ids[row, place] = rng.integers(0, 256, length)
        mask[row, place] = 1
    return TokenBatches(ids, mask, batch_size, "digest")


def nats_of_a_row(model: PreTrainedModel, tokens: list[int]) -> float:
    """The definition, one position after the other: -log of the softmax at the next token."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double().tolist()
    total = 0.0
    for position, following in enumerate(tokens[1:]):
        highest = max(logits[position])
        log_sum = highest + math.log(sum(math.exp(value - highest) for value in logits[position]))
        total += log_sum - logits[position][following]
    return total


@pytest.mark.parametrize("left", [False, True])
def test_perplexity_equals_a_plain_loop_and_leaves_padding_out(llama: PreTrainedModel, left: bool) -> None:
    batches = rows_of((20, 11, 2), left=left)
    result = perplexity(llama, batches)
    expected = [
        nats_of_a_row(llama, ids[mask == 1].tolist())
        for ids, mask in zip(batches.input_ids, batches.attention_mask, strict=True)
    ]
    assert result.predictions.tolist() == [19, 10, 1]
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.nats_per_token == pytest.approx(sum(expected) / 30, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 30), rel=1e-4)


def test_chunks_are_independent_of_each_other_and_of_the_batch_size(llama: PreTrainedModel) -> None:
    together = perplexity(llama, rows_of((16, 16, 16), batch_size=3))
    apart = perplexity(llama, rows_of((16, 16, 16), batch_size=1))
    assert apart.nats == pytest.approx(together.nats, rel=1e-5)
    changed = rows_of((16, 16, 16), batch_size=3)
    changed.input_ids[0] = 77
    other = perplexity(llama, changed)
    assert other.nats[1:] == pytest.approx(together.nats[1:], rel=1e-5)
    assert other.nats[0] != pytest.approx(together.nats[0], rel=1e-2)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(llama: PreTrainedModel) -> None:
    uniform = tiny.model("llama-untied")
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    assert perplexity(uniform, rows_of((30,))).perplexity == pytest.approx(tiny.VOCAB_SIZE, rel=1e-6)


def test_progress_is_told_after_every_minibatch(llama: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(llama, rows_of((8, 8, 8)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_weights_with_nan_are_refused_in_words() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError) as caught:
        perplexity(model, rows_of((12,)))
    assert str(caught.value) == (
        "the loss on the evaluation text is not finite; the model's weights or activations overflow; check the "
        "checkpoint, or evaluate in float32"
    )


def test_a_loss_that_no_perplexity_can_express_is_refused_in_words() -> None:
    model = tiny.model("llama-untied")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(CalibrationError, match="nats per token; no perplexity can express it, the model is broken; "):
        perplexity(model, rows_of((12,)))


def test_text_without_a_prediction_is_refused_in_words(llama: PreTrainedModel) -> None:
    with pytest.raises(CalibrationError) as caught:
        perplexity(llama, rows_of((1, 1)))
    assert str(caught.value) == (
        "the evaluation text predicts no token; every row holds fewer than two; give longer text"
    )


def test_the_report_states_ratio_interval_and_protocol(llama: PreTrainedModel) -> None:
    batches = CalibrationSet.builtin_held_out(max_tokens=1200, sequence_length=64, batch_size=8).encode(
        tiny.tokenizer()
    )
    dense = perplexity(llama, batches)
    pruned = perplexity(select_layers(llama, (0, 2, 5)), batches)
    report = quality_report(dense, pruned, batches, "builtin:held-out")
    low, high = report["ratio_interval"]
    assert report["ratio"] == pytest.approx(pruned.perplexity / dense.perplexity)
    assert low < report["ratio"] < high
    assert report["protocol"] == {
        "metric": "perplexity, exp of the mean next-token loss",
        "text": "builtin:held-out",
        "text_digest": batches.digest,
        "chunk_tokens": 64,
        "n_chunks": batches.n_samples,
        "n_tokens": batches.n_tokens - batches.n_samples,
        "note": "chunks are independent; the first token of each is not predicted",
    }
    assert report["schema"] == "quality/3"
    assert "unrepaired" not in report
    assert report["dense"]["nats_by_row"] == dense.nats.tolist()
    assert sum(report["pruned"]["predictions_by_row"]) == report["protocol"]["n_tokens"]
    assert summary(report) == (
        f"perplexity {dense.perplexity:.2f} -> {pruned.perplexity:.2f} (x{report['ratio']:.2f}) on "
        f"{report['protocol']['n_tokens']} tokens of builtin:held-out"
    )
    assert quality_report(dense, pruned, batches, "builtin:held-out") == report


def test_the_report_has_the_model_before_its_repair_against_the_same_dense_one() -> None:
    rng = np.random.default_rng(0)
    nats, counts = rng.uniform(10, 400, 40), np.full(40, 100)
    dense, pruned = Perplexity(nats, counts), Perplexity(nats + 10.0, counts)
    unrepaired, batches = Perplexity(nats + 30.0, counts), rows_of((8,) * 40)
    report = quality_report(dense, pruned, batches, "made up", unrepaired=unrepaired)
    assert report["unrepaired"]["nats_by_row"] == unrepaired.nats.tolist()
    assert report["unrepaired"].keys() == {*report["pruned"], "ratio", "ratio_interval"}
    assert report["unrepaired"]["ratio"] == pytest.approx(math.exp(0.3))
    assert report["unrepaired"]["ratio_interval"] == pytest.approx([math.exp(0.3)] * 2)
    assert report["ratio"] == pytest.approx(math.exp(0.1))
    assert f"(x{math.exp(0.1):.2f}), {unrepaired.perplexity:.2f} (x{math.exp(0.3):.2f}) before repair, on" in summary(
        report
    )


def test_the_interval_is_that_of_the_paired_difference() -> None:
    # Rows differ a lot, the two models always by 0.1 nats: pairing leaves nothing uncertain about the ratio.
    rng = np.random.default_rng(0)
    nats, counts = rng.uniform(10, 400, 40), np.full(40, 100)
    batches = rows_of((8,) * 40)
    report = quality_report(Perplexity(nats, counts), Perplexity(nats + 10.0, counts), batches, "made up")
    assert report["ratio_interval"] == pytest.approx([math.exp(0.1)] * 2, rel=1e-9)
    # A spread of the difference: the bootstrap agrees with the normal approximation of the mean.
    difference = rng.normal(10.0, 30.0, 40)
    report = quality_report(Perplexity(nats, counts), Perplexity(nats + difference, counts), batches, "made up")
    middle, error = difference.mean() / 100, difference.std() / 100 / math.sqrt(40)
    expected = [math.exp(middle - 1.96 * error), math.exp(middle + 1.96 * error)]
    assert report["ratio_interval"] == pytest.approx(expected, rel=0.02)


def test_a_ratio_of_different_rows_is_refused_in_words() -> None:
    one = Perplexity(np.array([5.0, 6.0]), np.array([4, 4]))
    other = Perplexity(np.array([5.0]), np.array([7]))
    with pytest.raises(CalibrationError) as caught:
        quality_report(one, other, rows_of((8, 8)), "made up")
    assert str(caught.value) == (
        "the dense model predicted 8 tokens in 2 rows, the pruned one 7 in 1; a ratio needs the same rows; evaluate "
        "both on one text"
    )
