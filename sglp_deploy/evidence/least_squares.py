"""Ridge regression towards given weights, from sums that minibatches are added to."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class NormalEquations:
    """Sums of ``x'x``, ``x'y`` and ``y'y``, kept in float64; memory does not depend on the number of rows.

    Args:
        inputs: Columns of x.
        outputs: Columns of y.
        device: Where the sums are kept.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.power = 0.0
        self.n_rows = 0

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Add rows.

        Args:
            x: (rows, inputs), float32 or float64.
            y: (rows, outputs).
            weight: What each row's squared error counts, (rows).
        """
        # A minibatch's products in its own precision, the sums over minibatches in float64: products in float64 take
        # four times as long, and rows that are scaled to one size lose nothing.
        root = weight.to(x.dtype).sqrt().unsqueeze(-1)
        scaled, wanted = x * root, y.to(x.dtype) * root
        self.gram += (scaled.T @ scaled).double()
        self.cross += (scaled.T @ wanted).double()
        self.power += float(wanted.double().pow(2).sum())
        self.n_rows += len(x)

    def of_outputs(self, start: int, stop: int) -> NormalEquations:
        """The same rows with some columns of y only; the power stays that of all, which moves every error alike."""
        part = NormalEquations(0, 0, self.gram.device)
        part.gram, part.cross, part.power, part.n_rows = self.gram, self.cross[:, start:stop], self.power, self.n_rows
        return part

    def error(self, weights: torch.Tensor) -> float:
        """Summed weighted squared error of ``x @ weights``, relative to that of predicting zero."""
        quadratic = ((self.gram @ weights) * weights).sum() - 2 * (self.cross * weights).sum()
        return (float(quadratic) + self.power) / max(self.power, 1e-300)

    def solve(self, towards: torch.Tensor, ridge: float) -> torch.Tensor:
        """Weights (inputs, outputs) of the least squared error plus ``ridge`` times the squared way from ``towards``.

        The ridge is in units of the mean diagonal of ``x'x``, so that one value fits any scale and number of rows.
        """
        size = ridge * self.gram.diagonal().mean().clamp(min=1e-30)
        left = self.gram + size * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        # Solved for the way from the old weights: where x says nothing they stay exactly as they are.
        right = self.cross - self.gram @ towards
        factor, fault = torch.linalg.cholesky_ex(left)
        if int(fault):  # rows that depend on one another, and next to no ridge
            found: torch.Tensor = torch.linalg.lstsq(left, right).solution
            return towards + found
        way: torch.Tensor = torch.cholesky_solve(right, factor)
        return towards + way


def best_ridge(
    fitted: NormalEquations, held_out: NormalEquations, towards: torch.Tensor, ridges: Sequence[float]
) -> tuple[torch.Tensor, float, float]:
    """Weights, ridge and held-out error of the ridge that does best on rows that were not fitted."""
    tried = []
    for ridge in ridges:
        weights = fitted.solve(towards, ridge)
        tried.append((held_out.error(weights), ridge, weights))
    error, ridge, weights = min(tried, key=lambda each: each[0])
    return weights, ridge, error
