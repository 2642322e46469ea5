"""Means, paired differences and their intervals against formulas and against enumeration."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sglp_deploy.errors import CalibrationError
from sglp_deploy.tasks.scores import Scores, alone, paired


def scores(values: NDArray[np.float64]) -> Scores:
    return Scores({"acc": values}, {"acc": "accuracy"}, {"kind": "made up", "source": "nowhere"})


def binary(rng: np.random.Generator, share: float, count: int) -> NDArray[np.float64]:
    return (rng.random(count) < share).astype(np.float64)


def test_the_interval_of_a_mean_agrees_with_the_normal_approximation() -> None:
    values = binary(np.random.default_rng(1), 0.7, 400)
    found = alone(scores(values))["metrics"]["acc"]
    error = values.std() / math.sqrt(400)
    assert found["value"] == values.mean()
    assert found["interval"] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.006)


def test_the_interval_of_a_few_items_agrees_with_all_resamples_there_are() -> None:
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    every = [sum(draw) / 5 for draw in itertools.product(values, repeat=5)]
    expected = np.quantile(every, [0.025, 0.975])
    assert alone(scores(values))["metrics"]["acc"]["interval"] == pytest.approx(expected.tolist())


def test_the_difference_is_paired() -> None:
    """The pruned model misses exactly ten items more: two intervals overlap, that of the difference excludes 0."""
    dense = binary(np.random.default_rng(0), 0.6, 300)
    pruned = dense.copy()
    pruned[np.flatnonzero(dense)[:10]] = 0.0
    found = paired(scores(dense), scores(pruned))["metrics"]["acc"]
    assert found["difference"] == pytest.approx(-10 / 300)
    low, high = found["difference_interval"]
    error = (pruned - dense).std() / math.sqrt(300)
    assert [low, high] == pytest.approx([-10 / 300 - 1.96 * error, -10 / 300 + 1.96 * error], abs=0.004)
    assert high < 0
    assert found["dense"]["interval"][0] < found["pruned"]["interval"][1]
    assert found["ratio"] == pytest.approx(pruned.mean() / dense.mean())
    assert found["ratio_interval"][0] < found["ratio"] < found["ratio_interval"][1] < 1


def test_two_models_that_answer_alike_differ_by_nothing_at_all() -> None:
    values = binary(np.random.default_rng(5), 0.5, 50)
    found = paired(scores(values), scores(values.copy()))["metrics"]["acc"]
    assert (found["difference"], found["difference_interval"]) == (0.0, [0.0, 0.0])
    assert found["ratio_interval"] == pytest.approx([1.0, 1.0])


def test_the_difference_of_pruned_minus_dense_changes_sign_with_the_models() -> None:
    rng = np.random.default_rng(7)
    one, other = binary(rng, 0.3, 80), binary(rng, 0.6, 80)
    there = paired(scores(one), scores(other))["metrics"]["acc"]
    back = paired(scores(other), scores(one))["metrics"]["acc"]
    assert there["difference"] > 0
    assert there["difference"] == pytest.approx(-back["difference"])
    assert there["difference_interval"] == pytest.approx([-value for value in reversed(back["difference_interval"])])


def test_many_items_are_drawn_in_parts_and_the_interval_stays_right() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, 4000)  # 2,000 resamples of 4,000 are more than one part
    low, high = alone(scores(values))["metrics"]["acc"]["interval"]
    error = values.std() / math.sqrt(4000)
    assert [low, high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.003)


def test_no_ratio_is_given_where_the_dense_model_may_have_none_right() -> None:
    found = paired(scores(np.array([0.0, 0.0, 1.0])), scores(np.ones(3)))["metrics"]["acc"]
    assert found["ratio"] == pytest.approx(3.0)
    assert found["ratio_interval"] is None
    assert paired(scores(np.zeros(3)), scores(np.ones(3)))["metrics"]["acc"]["ratio"] is None


def test_scores_of_other_items_are_refused_in_words() -> None:
    with pytest.raises(CalibrationError) as caught:
        paired(scores(np.ones(3)), scores(np.ones(2)))
    assert str(caught.value) == (
        "the dense model has 3 values of acc, the pruned one 2; a difference needs the same items; judge both by one "
        "file"
    )


def test_the_record_is_json_with_raw_values_and_says_which_way_is_better() -> None:
    made = Scores(
        {"acc": np.array([1.0, 0.0]), "nats": np.array([1.5, 2.25])},
        {"acc": "accuracy", "nats": "nats of a word"},
        {"kind": "made up", "chance": None},
        frozenset({"nats"}),
    )
    found = json.loads(json.dumps(paired(made, made)))
    assert found["by_item"]["dense"] == {"acc": [1, 0], "nats": [1.5, 2.25]}
    assert [found["metrics"][name]["higher_is_better"] for name in ("acc", "nats")] == [True, False]
    assert (found["metric"], found["n_items"], found["kind"]) == ("acc", 2, "made up")
    assert alone(made)["by_item"] == {"model": found["by_item"]["dense"]}
