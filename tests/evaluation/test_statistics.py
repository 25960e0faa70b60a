"""Intervals of scores: the published formulas, on numbers one can check by hand."""

import math

import numpy as np
import pytest

from hf_rsheat.errors import DataError
from hf_rsheat.evaluation.statistics import corrected_interval, cross_validate, wilson_interval


def test_corrected_interval_is_wider_than_the_naive_one_by_the_published_factor():
    scores = np.random.default_rng(0).normal(0.7, 0.05, 25).tolist()
    result = corrected_interval(scores, folds=5)
    half = (result["interval95"][1] - result["interval95"][0]) / 2
    naive = 2.063899 * np.std(scores, ddof=1) / 5  # Student's t, 24 degrees of freedom
    assert result["value"] == pytest.approx(np.mean(scores))
    assert half / naive == pytest.approx(math.sqrt(1 + 25 / 4), rel=1e-5)  # (1/25 + 1/4) over 1/25


def test_wilson_interval_matches_a_worked_example_and_stays_within_0_and_1():
    assert wilson_interval(8, 10)["interval95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = wilson_interval(10, 10)["interval95"]
    assert low > 0.7
    assert high <= 1


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_probes_learn_separable_classes_and_not_noise(task):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 15)
    noise = rng.normal(size=(45, 6)).astype(np.float32)
    separable = noise + 6 * np.eye(6, dtype=np.float32)[labels]
    good = cross_validate(separable, labels, task, folds=3, repeats=2, neighbours=3)
    bad = cross_validate(noise, labels, task, folds=3, repeats=2, neighbours=3)
    assert len(good["accuracy"]) == len(good["macro_f1"]) == 6
    assert np.mean(good["accuracy"]) > 0.95
    assert np.mean(bad["accuracy"]) < 0.6


def test_splits_are_the_same_for_every_feature_set():
    labels = np.repeat([0, 1], 6)
    vectors = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    first = cross_validate(vectors, labels, "knn", 3, 2, 1)
    assert first == cross_validate(vectors, labels, "knn", 3, 2, 1)


def test_too_few_images_for_the_folds_say_which_number_would_do():
    with pytest.raises(DataError, match="folds=2"):
        cross_validate(np.zeros((5, 2), np.float32), np.array([0, 0, 0, 1, 1]), "knn", 5, 1, 1)
