"""Distances of two outputs against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sglp_deploy.parity import distances


def test_kl_is_taken_from_the_reference_to_the_artifact_in_nats() -> None:
    wanted = np.log(np.array([[0.5, 0.25, 0.25]])) + 7.0  # a constant added to all logits changes no probability
    got = np.log(np.array([[0.25, 0.5, 0.25]]))
    assert distances.kl_divergence(wanted, got) == pytest.approx([0.25 * math.log(2)])
    skewed = np.log(np.array([[0.8, 0.1, 0.1]]))
    forth = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    back = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    assert distances.kl_divergence(wanted, skewed) == pytest.approx([forth])
    assert distances.kl_divergence(skewed, wanted) == pytest.approx([back])


def test_logits_too_large_for_exp_have_probabilities_all_the_same() -> None:
    assert distances.log_softmax(np.array([[1e4, 1e4]])) == pytest.approx(np.full((1, 2), math.log(0.5)))


def test_cosine_of_two_zero_vectors_is_one_and_of_a_zero_with_anything_else_zero() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    got = np.array([[4.0, 3.0], [0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]])
    assert distances.cosine(wanted, got) == pytest.approx([0.96, 1.0, 0.0, -1.0])


def test_the_first_value_that_is_not_finite_is_named_with_its_side() -> None:
    fine = np.zeros((2, 3))
    broken = fine.copy()
    broken[1, 2] = np.nan
    assert distances.first_not_finite(fine, fine) is None
    assert distances.first_not_finite(fine, broken) == ("artifact", 1, 2)
    assert distances.first_not_finite(broken, broken) == ("reference", 1, 2)


def test_choices_count_apart_where_the_reference_is_sure() -> None:
    wanted = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 0.1]])
    got = np.array([[0.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    assert distances.largest_difference(wanted, got) == pytest.approx([1.0, 1.0, 1.0])
    found = distances.choice_statistics(distances.margins(wanted), distances.same_choice(wanted, got), 0.5)
    assert found == {"n_stable": 2, "n_unstable": 1, "top1_stable": 0.5, "top1_unstable": 0.0}
    sure = distances.choice_statistics(distances.margins(wanted), distances.same_choice(wanted, got), 0.01)
    assert sure["top1_unstable"] is None
