from __future__ import annotations

import numpy as np
import pytest

from planted import planted_stats
from sglp_deploy.errors import CalibrationError, ConfigError
from sglp_deploy.importance import (
    CRITERIA,
    ImportanceScores,
    block_influence_scores,
    grad_norm_scores,
    score,
    taylor_scores,
)

LADDER = np.arange(12.0)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("grad-norm", LADDER + 1),
        ("grad-norm-weight-sum", LADDER + 2),
        ("grad-norm-output", LADDER + 3),
        ("taylor", LADDER + 4),
        ("block-influence", (LADDER + 1) / 100),
    ],
)
def test_each_criterion_reads_its_own_statistic(criterion: str, expected: np.ndarray) -> None:
    scores = score(planted_stats(), criterion)
    assert scores.criterion == criterion
    np.testing.assert_allclose(scores.values, expected, rtol=1e-12)


def test_a_layer_that_turns_nothing_has_no_block_influence() -> None:
    cosine = np.full(12, 0.5)
    cosine[2] = 1.0
    values = block_influence_scores(planted_stats(cosine=cosine)).values
    assert values[2] == 0.0
    assert values.argmin() == 2


def test_named_functions_and_the_table_agree() -> None:
    stats = planted_stats()
    for scores in (
        grad_norm_scores(stats),
        grad_norm_scores(stats, "weight_sum"),
        grad_norm_scores(stats, "output"),
        block_influence_scores(stats),
        taylor_scores(stats),
    ):
        np.testing.assert_array_equal(scores.values, CRITERIA[scores.criterion](stats).values)


def test_an_unknown_criterion_gets_the_nearest_match_and_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        score(planted_stats(), "gradnorm")
    text = str(caught.value)
    assert "unknown criterion 'gradnorm'" in text
    assert "did you mean 'grad-norm'?" in text
    assert all(name in text for name in CRITERIA)


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    with pytest.raises(ConfigError, match=r"unknown criterion 'zzz'; .*; choose one of block-influence, grad-norm"):
        score(planted_stats(), "zzz")


def test_an_unknown_gradnorm_definition_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown GradNorm definition 'parameter-l2'; .*did you mean 'parameter_l2'"):
        grad_norm_scores(planted_stats(), "parameter-l2")


def test_scores_that_cannot_rank_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"the mine score of layer 1 is nan; .*check the weights"):
        ImportanceScores(np.array([1.0, np.nan]), "mine")
    with pytest.raises(CalibrationError, match=r"mine scores have shape \(2, 2\); .*pass shape \(L,\)"):
        ImportanceScores(np.ones((2, 2)), "mine")


def test_scores_cannot_be_altered() -> None:
    source = np.ones(3)
    scores = ImportanceScores(source, "mine")
    source[0] = 9.0
    assert scores.values.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 2.0
