"""The sums and their solution against numpy's own least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglp_deploy.evidence.least_squares import NormalEquations, best_ridge

ROWS, INPUTS, OUTPUTS = 60, 7, 4


def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(ROWS, INPUTS)),
        rng.normal(size=(ROWS, OUTPUTS)),
        rng.uniform(0.1, 5, size=ROWS),
        rng.normal(size=(INPUTS, OUTPUTS)),
    )


def _sums(x: np.ndarray, y: np.ndarray, weight: np.ndarray, pieces: int = 1) -> NormalEquations:
    sums = NormalEquations(x.shape[1], y.shape[1])
    for part in np.array_split(np.arange(len(x)), pieces):
        sums.add(*(torch.from_numpy(each[part]) for each in (x, y, weight)))
    return sums


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 3.0])
@pytest.mark.parametrize("pieces", [1, 7])
def test_the_solution_is_that_of_the_stacked_problem(ridge: float, pieces: int) -> None:
    x, y, weight, old = _drawn(0)
    root = np.sqrt(weight)[:, None]
    pull = np.sqrt(ridge * np.mean(np.sum((root * x) ** 2, axis=0)))
    stacked = np.concatenate([root * x, pull * np.eye(INPUTS)])
    wanted = np.linalg.lstsq(stacked, np.concatenate([root * y, pull * old]), rcond=None)[0]
    found = _sums(x, y, weight, pieces).solve(torch.from_numpy(old), ridge)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-12)


def test_directions_that_no_row_has_keep_their_weights() -> None:
    x, y, weight, old = _drawn(1)
    x[:, 3] = 0
    found = _sums(x, y, weight).solve(torch.from_numpy(old), 1e-4).numpy()
    np.testing.assert_allclose(found[3], old[3], rtol=1e-12)
    assert not np.allclose(found[2], old[2], rtol=0.1)


def test_rows_that_depend_on_one_another_are_solved_all_the_same() -> None:
    x, y, weight, old = _drawn(2)
    x[:, 5] = x[:, 4]
    found = _sums(x, y, weight).solve(torch.from_numpy(old), 1e-18)
    assert bool(found.isfinite().all())
    alone = np.linalg.lstsq(np.sqrt(weight)[:, None] * x, np.sqrt(weight)[:, None] * y, rcond=None)[0]

    def residual(weights: np.ndarray) -> float:
        return float((weight[:, None] * (x @ weights - y) ** 2).sum())

    assert residual(found.numpy()) == pytest.approx(residual(alone), rel=1e-6)


def test_the_error_is_the_weighted_one_of_the_rows() -> None:
    x, y, weight, old = _drawn(3)
    wanted = (weight[:, None] * (x @ old - y) ** 2).sum() / (weight[:, None] * y**2).sum()
    assert _sums(x, y, weight, 5).error(torch.from_numpy(old)) == pytest.approx(wanted, rel=1e-12)


def test_the_ridge_is_the_best_on_rows_that_were_not_fitted() -> None:
    x, y, weight, _ = _drawn(4)
    fitted, held_out = _sums(x[:12], y[:12], weight[:12]), _sums(x[12:], y[12:], weight[12:])
    ridges = (1e-6, 1e-3, 1e-1, 1.0, 10.0, 1e3)
    weights, ridge, error = best_ridge(fitted, held_out, torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64), ridges)
    errors = {each: held_out.error(fitted.solve(torch.zeros_like(weights), each)) for each in ridges}
    assert errors[ridge] == min(errors.values()) == error
    assert ridge > 1e-6  # seven unknowns from twelve rows of noise
