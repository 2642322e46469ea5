from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planted import block_matrix, planted_stats
from sglp_deploy.errors import ArtifactError, CalibrationError, ConfigError
from sglp_deploy.similarity import SimilarityMatrix, gram, hsic_terms, linear_cka


def draw(seed: int, n: int, *widths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(n, width)) for width in widths]


def u_statistic(k: np.ndarray, m: np.ndarray) -> float:
    """Song's HSIC as it is defined: the mean over all ordered 4-tuples of distinct rows."""
    terms = [
        k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q]
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return float(np.mean(terms))


def test_unbiased_hsic_is_the_u_statistic_over_all_quadruples() -> None:
    layers = draw(0, 7, 3, 5, 2)
    unbiased, _ = hsic_terms(np.stack([gram(layer) for layer in layers]))
    expected = [[u_statistic(a @ a.T, b @ b.T) for b in layers] for a in layers]
    np.testing.assert_allclose(unbiased, expected, rtol=1e-10, atol=1e-12)


def test_unbiased_hsic_is_songs_trace_formula() -> None:
    x, y = draw(1, 40, 6, 9)
    k, m = gram(x), gram(y)
    n = len(k)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    trace = np.trace(k @ m) + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum()
    unbiased, _ = hsic_terms(np.stack([gram(x), gram(y)]))
    assert unbiased[0, 1] == pytest.approx(trace / n / (n - 3), rel=1e-10)


def test_biased_hsic_is_the_squared_cross_covariance() -> None:
    x, y = draw(2, 30, 4, 6)
    _, biased = hsic_terms(np.stack([gram(x), gram(y)]))
    cross = (x - x.mean(0)).T @ (y - y.mean(0))
    assert biased[0, 1] == pytest.approx((cross**2).sum() / 29**2, rel=1e-10)


def test_biased_cka_equals_its_feature_space_form() -> None:
    x, y = draw(3, 25, 8, 5)
    y[:, 0] += x[:, 0]
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(a.T @ b) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert linear_cka(x, y, unbiased=False) == pytest.approx(expected, rel=1e-10)


def test_hsic_accepts_float32_and_keeps_its_input() -> None:
    grams = np.stack([gram(layer) for layer in draw(4, 12, 3, 3)]).astype(np.float32)
    before = grams.copy()
    unbiased, biased = hsic_terms(grams)
    assert unbiased.dtype == biased.dtype == np.float64
    np.testing.assert_array_equal(grams, before)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), unbiased=st.booleans())
def test_cka_ignores_rotation_scale_shift_and_order_of_its_sides(seed: int, scale: float, unbiased: bool) -> None:
    x, y, square = draw(seed, 12, 5, 7, 12)
    y[:, :5] += x
    rotation = np.linalg.qr(square[:5, :5])[0]
    value = linear_cka(x, y, unbiased)
    assert linear_cka(scale * x @ rotation + 3.0, y, unbiased) == pytest.approx(value, abs=1e-9)
    assert linear_cka(y, x, unbiased) == pytest.approx(value, abs=1e-12)
    assert linear_cka(x, x, unbiased) == pytest.approx(1.0, abs=1e-12)
    order = np.argsort(square[:, 0])
    assert linear_cka(x[order], y[order], unbiased) == pytest.approx(value, abs=1e-10)


def test_cka_notices_a_map_that_is_invertible_but_no_rotation() -> None:
    (x,) = draw(5, 50, 4)
    assert linear_cka(x, x * [1.0, 1.0, 1.0, 30.0]) < 0.9


@pytest.mark.parametrize(("n", "biased"), [(16, 0.969), (64, 0.890), (256, 0.667), (1024, 0.333)])
def test_few_rows_make_unrelated_layers_look_alike_only_when_biased(n: int, biased: float) -> None:
    x, y = draw(6, n, 512, 512)
    assert linear_cka(x, y, unbiased=False) == pytest.approx(biased, abs=0.01)
    assert abs(linear_cka(x, y)) < 0.05


def test_a_large_mean_does_not_cost_digits() -> None:
    x, y = draw(7, 20, 4, 4)
    y += x
    assert linear_cka(x + 1e6, y) == pytest.approx(linear_cka(x, y), abs=1e-8)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 rows are too few; unbiased HSIC divides by n - 3; pass at least 4 rows"):
        linear_cka(np.eye(3), np.eye(3))


def test_sides_with_different_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"x has shape \(5, 2\) and y \(6, 2\); .*same n rows"):
        linear_cka(np.ones((5, 2)), np.ones((6, 2)))


def test_grams_must_be_a_stack_of_square_matrices() -> None:
    with pytest.raises(ConfigError, match=r"grams has shape \(4, 5\); .*pass \(L, n, n\)"):
        hsic_terms(np.ones((4, 5)))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_constant_side_is_refused(constant: float, unbiased: bool) -> None:
    x = np.full((10, 3), constant)
    with pytest.raises(CalibrationError, match=r"y does not vary over its 10 rows .*pass rows that differ"):
        linear_cka(draw(0, 10, 2)[0], x, unbiased)


def test_a_side_with_nan_is_refused() -> None:
    (x,) = draw(0, 10, 2)
    with pytest.raises(CalibrationError, match="y holds NaN or infinity"):
        linear_cka(x, np.where(x > 0, np.nan, x))


def test_streamed_sums_become_a_ratio_of_sums() -> None:
    layers = draw(8, 24, 4, 4, 4)
    layers[1] += layers[0]
    batches = [hsic_terms(np.stack([gram(layer[rows : rows + 8]) for layer in layers])) for rows in (0, 8, 16)]
    sums = np.sum([unbiased for unbiased, _ in batches], axis=0)
    stats = planted_stats((1, 1, 1), hsic_unbiased=sums)
    values = SimilarityMatrix.from_stats(stats).values
    assert values[0, 1] == pytest.approx(sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1]), rel=1e-12)
    assert values[0, 2] < values[0, 1]


def test_each_estimator_reads_its_own_sums() -> None:
    stats, planted = planted_stats(), block_matrix((2, 4, 6))
    off = ~np.eye(12, dtype=bool)
    for estimator, expected in {
        "unbiased": planted,
        "biased": 0.5 * planted + 0.5,
        "mean_of_ratios": 0.9 * planted,
    }.items():
        matrix = SimilarityMatrix.from_stats(stats, estimator)
        np.testing.assert_allclose(matrix.values[off], expected[off], rtol=1e-12)
        np.testing.assert_array_equal(np.diag(matrix.values), 1.0)
        assert matrix.estimator == estimator
        assert matrix.n_layers == 12


@pytest.mark.parametrize("estimator", ["unbiased", "mean_of_ratios"])
@pytest.mark.parametrize("own", [0.0, -1e-9])
def test_a_constant_layer_is_named(estimator: str, own: float) -> None:
    sums = planted_stats().hsic_unbiased.copy()
    sums[3, 3] = own
    message = r"layer 3 \(layers\.3\) has a self-HSIC of .*does not vary .*calibrate on more or more varied samples"
    with pytest.raises(CalibrationError, match=message):
        SimilarityMatrix.from_stats(planted_stats(hsic_unbiased=sums), estimator)


def test_an_unknown_estimator_gets_the_nearest_match_and_the_list() -> None:
    message = "unknown CKA estimator 'unbiast'; .*did you mean 'unbiased'.* biased, mean_of_ratios, unbiased"
    with pytest.raises(ConfigError, match=message):
        SimilarityMatrix.from_stats(planted_stats(), "unbiast")
    with pytest.raises(ConfigError, match=message):
        SimilarityMatrix(np.eye(2), "unbiast")


def test_rounding_beyond_one_is_clamped_and_negative_values_are_kept() -> None:
    values = np.array([[1.0, 1.00001, -0.02], [1.00001, 1.0, 0.5], [-0.02, 0.5, 1.0]])
    matrix = SimilarityMatrix(values, "unbiased")
    assert matrix.values[0, 1] == 1.0
    assert matrix.values[0, 2] == -0.02
    assert values[0, 1] == 1.00001
    with pytest.raises(ValueError, match="read-only"):
        matrix.values[0, 0] = 2.0


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (np.ones((2, 3)), r"it has shape \(2, 3\) and not \(L, L\)"),
        ([[1.0, np.nan], [np.nan, 1.0]], "it holds NaN or infinity"),
        ([[1.0, 0.5], [0.4, 1.0]], "it is not symmetric"),
        ([[0.9, 0.5], [0.5, 1.0]], "its diagonal is not 1"),
        ([[1.0, 1.2], [1.2, 1.0]], "layers 0 and 1 have 1.2, beyond 1 by more than rounding"),
    ],
)
def test_what_is_no_cka_matrix_is_refused(values: object, fault: str) -> None:
    with pytest.raises(CalibrationError, match=f"this is no CKA matrix; {fault}; make it with"):
        SimilarityMatrix(np.asarray(values), "unbiased")


def test_a_matrix_survives_json_exactly() -> None:
    matrix = SimilarityMatrix.from_stats(planted_stats())
    value = json.loads(json.dumps(matrix.to_json()))
    assert value["schema"] == "similarity/1"
    again = SimilarityMatrix.from_json(value)
    np.testing.assert_array_equal(again.values, matrix.values)
    assert again.estimator == "unbiased"


def test_a_matrix_of_an_unknown_schema_or_shape_is_refused() -> None:
    value = SimilarityMatrix.from_stats(planted_stats()).to_json()
    with pytest.raises(ArtifactError, match="has schema 'similarity/9'; this version reads 'similarity/1'"):
        SimilarityMatrix.from_json(value | {"schema": "similarity/9"})
    with pytest.raises(ArtifactError, match=r"lacks or mistypes a field; .*make it again"):
        SimilarityMatrix.from_json({"schema": "similarity/1", "values": [[1.0], [1.0, 2.0]], "estimator": "unbiased"})
