"""How redundant features are (arXiv 2601.22841): correlation, decay of explained variance, effective dimensionality.

All take frozen features `(images, dimensions)` and compute in float64.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def correlation_matrix(features: Array) -> Array:
    """Pearson correlation of the dimensions that vary, `(varying, varying)`."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    spread = np.sqrt((centred**2).mean(axis=0))
    varying = spread > 1e-12 * max(float(np.abs(features).max(initial=0.0)), np.finfo(np.float64).tiny)
    standardised = centred[:, varying] / spread[varying]
    return standardised.T @ standardised / len(features)


def dead_dimensions(features: Array) -> int:
    """Dimensions that are the same for all images: without a correlation, so left out of it (ours)."""
    return features.shape[1] - len(correlation_matrix(features))


def mean_feature_correlation(features: Array) -> float:
    """MFC: mean absolute correlation over all pairs of dimensions, 0 to 1; NaN with fewer than two that vary."""
    correlation = correlation_matrix(features)
    pairs = np.abs(correlation[np.triu_indices(len(correlation), k=1)])
    return float(pairs.mean()) if len(pairs) else float("nan")


def covariance_spectrum(features: Array) -> Array:
    """Eigenvalues of the covariance of the centred features, descending, not below 0."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    return np.linalg.svd(centred, compute_uv=False) ** 2 / len(features)


def explained_variance_slope(spectrum: Array, max_components: int | None = None) -> float:
    """Least-squares slope of log(explained variance ratio) against log(index): 0 if all directions matter alike.

    Args:
        spectrum: Eigenvalues, descending.
        max_components: Fit only that many. Which ones the paper fits is unknown; here all above 1e-12 of the first.

    Returns:
        The slope; NaN with fewer than two eigenvalues to fit.
    """
    kept = spectrum[spectrum > 1e-12 * spectrum[0]][:max_components]
    if len(kept) < 2:
        return float("nan")
    return float(np.polyfit(np.log(np.arange(1, len(kept) + 1)), np.log(kept / spectrum.sum()), 1)[0])


def effective_dimensionality(spectrum: Array) -> float:
    """Participation ratio, (sum of eigenvalues)² / sum of squares: 1 to the number of dimensions; 0 of zeros."""
    squares = float((spectrum**2).sum())
    return float(spectrum.sum()) ** 2 / squares if squares else 0.0


def redundancy_measures(features: Array) -> dict[str, float]:
    """All measures of a set of features, and the number of dimensions that do not vary."""
    spectrum = covariance_spectrum(features)
    return {
        "feature_correlation": mean_feature_correlation(features),
        "explained_variance_slope": explained_variance_slope(spectrum),
        "effective_dimensionality": effective_dimensionality(spectrum),
        "dead_dimensions": dead_dimensions(features),
    }
