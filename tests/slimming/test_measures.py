"""Measures of redundancy on data whose answer is known in closed form."""

import math

import numpy as np
import pytest

from hf_rsheat.slimming.measures import (
    covariance_spectrum,
    dead_dimensions,
    effective_dimensionality,
    explained_variance_slope,
    mean_feature_correlation,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_independent_gaussians_are_not_redundant(rng):
    images, dimensions = 20_000, 50
    features = rng.normal(size=(images, dimensions))
    spectrum = covariance_spectrum(features)
    assert effective_dimensionality(spectrum) == pytest.approx(dimensions / (1 + dimensions / images), rel=0.01)
    assert mean_feature_correlation(features) == pytest.approx(math.sqrt(2 / (math.pi * images)), rel=0.05)
    assert abs(explained_variance_slope(spectrum)) < 0.1


def test_one_direction_is_as_redundant_as_can_be(rng):
    features = rng.normal(size=(100, 1)) * rng.normal(size=(1, 7))
    assert effective_dimensionality(covariance_spectrum(features)) == pytest.approx(1)
    assert mean_feature_correlation(features) == pytest.approx(1)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_a_power_law_of_eigenvalues_has_that_slope(power):
    spectrum = np.arange(1, 40, dtype=float) ** -power
    assert explained_variance_slope(spectrum) == pytest.approx(-power, abs=1e-12)


def test_eigenvalues_of_given_data_are_those_of_numpy(rng):
    features = rng.normal(size=(30, 6)) * np.arange(1, 7)
    expected = np.linalg.eigvalsh(np.cov(features.T, bias=True))[::-1]
    np.testing.assert_allclose(covariance_spectrum(features), expected, rtol=1e-10)


def test_rotation_changes_no_spectrum_and_scaling_no_correlation(rng):
    features = rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    spectrum, rotated = covariance_spectrum(features), covariance_spectrum(features @ rotation)
    assert effective_dimensionality(rotated) == pytest.approx(effective_dimensionality(spectrum))
    assert explained_variance_slope(rotated) == pytest.approx(explained_variance_slope(spectrum))
    scaled = features * rng.uniform(0.1, 10, size=8)
    assert mean_feature_correlation(scaled) == pytest.approx(mean_feature_correlation(features))


def test_dimensions_that_do_not_vary_are_left_out_and_counted(rng):
    features = rng.normal(size=(50, 4))
    padded = np.concatenate([features, np.full((50, 3), 7.25)], axis=1)
    assert dead_dimensions(padded) == 3
    assert mean_feature_correlation(padded) == pytest.approx(mean_feature_correlation(features))


def test_features_without_any_variation_have_no_correlation_and_no_slope():
    features = np.ones((5, 3), np.float32)
    assert math.isnan(mean_feature_correlation(features))
    assert math.isnan(explained_variance_slope(covariance_spectrum(features)))
    assert effective_dimensionality(covariance_spectrum(features)) == 0
