"""Hilbert-Schmidt independence between representations of the same rows: what CKA divides, one minibatch at a time."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglp_deploy.errors import ConfigError

LEAST_ROWS: Final = 4  # the unbiased estimator divides by n - 3


def gram(x: ArrayLike) -> NDArray[np.float64]:
    """Inner products between the rows of ``x``: shape (n, d) to (n, n), in float64, not centred."""
    rows = np.asarray(x, dtype=np.float64)
    return rows @ rows.T


def hsic_terms(grams: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """HSIC between every two of L representations of the same n rows.

    All Gram matrices are centred at once and multiplied once: O(L^2 n^2) time, O(L n^2) memory, in float64.

    Args:
        grams: One Gram matrix per layer, shape (L, n, n), symmetric, n >= 4.

    Returns:
        ``(unbiased, biased)``, each (L, L) and symmetric.  ``unbiased`` is HSIC_1 of Song et al., computed as the
        inner product of U-centred matrices divided by n (n - 3); ``biased`` is tr(K H L H) / (n - 1)^2.

    Raises:
        ConfigError: If the shape is not (L, n, n) or n < 4.

    Source:
        Song et al. (2012), JMLR 13, 1393-1434; U-centring: Szekely and Rizzo (2014), Annals of Statistics 42,
        2382-2412; both estimators for CKA: Kornblith et al. (2019), Nguyen et al. (2021).
    """
    kernels = np.array(grams, dtype=np.float64)
    if kernels.ndim != 3 or kernels.shape[1] != kernels.shape[2]:
        raise ConfigError(f"grams has shape {kernels.shape}; one square matrix per layer is needed; pass (L, n, n)")
    n_layers, n, _ = kernels.shape
    if n < LEAST_ROWS:
        raise ConfigError(f"{n} rows are too few; unbiased HSIC divides by n - 3; pass at least {LEAST_ROWS} rows")
    means = kernels.mean(axis=1, keepdims=True)
    centred = kernels - means - means.transpose(0, 2, 1) + means.mean(axis=2, keepdims=True)
    flat = centred.reshape(n_layers, -1)
    biased = flat @ flat.T / (n - 1) ** 2

    diagonal = np.arange(n)
    kernels[:, diagonal, diagonal] = 0.0
    sums = kernels.sum(axis=1, keepdims=True)
    kernels -= (sums + sums.transpose(0, 2, 1)) / (n - 2)
    kernels += sums.sum(axis=2, keepdims=True) / ((n - 1) * (n - 2))
    kernels[:, diagonal, diagonal] = 0.0
    flat = kernels.reshape(n_layers, -1)
    return flat @ flat.T / (n * (n - 3)), biased
