from __future__ import annotations

import json

import numpy as np
import pytest

from planted import planted_stats
from sglp_deploy.errors import ArtifactError, CalibrationError
from sglp_deploy.evidence.statistics import LayerStats


def test_statistics_survive_json_exactly() -> None:
    stats = planted_stats()
    again = LayerStats.from_json(json.loads(json.dumps(stats.to_json())))
    assert again.to_json() == stats.to_json()
    assert again.n_layers == 12
    assert again.parameters.dtype == np.int64
    assert again.layer_names == stats.layer_names
    np.testing.assert_array_equal(again.hsic_unbiased, stats.hsic_unbiased)


@pytest.mark.parametrize("name", ["hsic_unbiased", "hsic_biased", "cka_batch_mean"])
def test_a_matrix_of_another_size_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has shape \(3, 3\), expected \(12, 12\)"):
        planted_stats(**{name: np.eye(3)})


def test_an_asymmetric_matrix_is_refused_by_name() -> None:
    values = planted_stats().hsic_biased.copy()
    values[0, 3] += 1
    with pytest.raises(ValueError, match="hsic_biased is not symmetric"):
        planted_stats(hsic_biased=values)


@pytest.mark.parametrize("name", ["cosine", "grad_l2", "grad_weight_sum", "grad_output", "taylor"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_names_its_layer(name: str, bad: float) -> None:
    values = np.ones(12)
    values[4] = bad
    with pytest.raises(
        CalibrationError, match=rf"{name} of layer 4 \(layers\.4\) is not finite; .*calibrate in float32"
    ):
        planted_stats(**{name: values})


def test_a_matrix_entry_that_is_not_finite_is_refused() -> None:
    values = planted_stats().hsic_unbiased.copy()
    values[7, 7] = np.nan
    with pytest.raises(CalibrationError, match="hsic_unbiased of layer 7"):
        planted_stats(hsic_unbiased=values)


@pytest.mark.parametrize("name", ["prunable", "parameters", "cosine", "grad_l2", "taylor"])
def test_a_vector_of_another_length_is_refused_by_name(name: str) -> None:
    short = getattr(planted_stats(), name)[:-1]
    with pytest.raises(ValueError, match=rf"{name} has shape \(11,\), expected \(12,\)"):
        planted_stats(**{name: short})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("taylor", 3.0, r"a field of the statistics is wrong; taylor has shape \(\), .*; calibrate again"),
        ("taylor", ["a"] * 12, "a field of the statistics is wrong; could not convert string to float: 'a'; calib"),
        ("hsic_biased", [[1.0, 2.0], [3.0]], "a field of the statistics is wrong; .*inhomogeneous"),
        ("parameters", [1, 2], r"a field of the statistics is wrong; parameters has shape \(2,\), expected \(12,\)"),
        ("loss", "high", "a field of the statistics is wrong; could not convert string to float: 'high'"),
        ("options", 3, "a field of the statistics is wrong; 'int' object is not iterable"),
    ],
)
def test_malformed_statistics_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        LayerStats.from_json(planted_stats().to_json() | {name: value})


def test_incomplete_statistics_name_what_is_missing() -> None:
    value = planted_stats().to_json()
    del value["grad_output"]
    with pytest.raises(ArtifactError, match="the statistics lack 'grad_output'; the file is not complete; calibrate"):
        LayerStats.from_json(value)
