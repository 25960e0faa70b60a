"""Scores of repeated cross-validation and their intervals."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingExtraError

PROBES = ("knn", "linear")


def require_sklearn() -> None:
    """Refuse early, naming the extra.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "eval", "Evaluation") from error


def _probe(task: str, neighbours: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task == "knn":
        return make_pipeline(StandardScaler(), KNeighborsClassifier(neighbours, metric="cosine"))
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def cross_validate(
    vectors: NDArray[np.float32], labels: NDArray[np.int64], task: str, folds: int, repeats: int, neighbours: int
) -> dict[str, list[float]]:
    """Accuracy and macro F1 of a probe on every held-out fold.

    The splits depend on the labels alone, so scores of two feature sets on the same images are paired.

    Args:
        vectors: (images, dimensions); standardised with the training folds' statistics.
        labels: (images,) class indices.
        task: "knn" (cosine distance, `neighbours` votes) or "linear" (logistic regression).
        folds: parts of each stratified split.
        repeats: how often the images are split anew.

    Returns:
        Metric name -> `folds * repeats` scores from 0 to 1.

    Raises:
        DataError: a class has fewer images than there are folds.
    """
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.model_selection import RepeatedStratifiedKFold

    if (smallest := int(np.bincount(labels).min())) < folds:
        raise DataError(f"The smallest class has {smallest} images, too few for {folds} folds: use folds={smallest}.")
    scores: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
    for train, test in RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=0).split(
        vectors, labels
    ):
        predicted = _probe(task, min(neighbours, len(train))).fit(vectors[train], labels[train]).predict(vectors[test])
        scores["accuracy"].append(float(accuracy_score(labels[test], predicted)))
        scores["macro_f1"].append(float(f1_score(labels[test], predicted, average="macro", zero_division=0)))
    return scores


def corrected_interval(scores: Sequence[float], folds: int) -> dict[str, Any]:
    """Mean of repeated cross-validation scores (or paired differences) with a 95 % interval.

    The corrected resampled t interval of Nadeau and Bengio (Machine Learning 52, 2003): training sets of different
    folds overlap, so the variance of the mean is s² (1/J + n_test/n_train) for J scores, not s²/J.

    Returns:
        {"value": mean, "interval95": [low, high]}.
    """
    from scipy.stats import t

    count = len(scores)
    spread = float(np.std(scores, ddof=1)) * math.sqrt(1 / count + 1 / (folds - 1))
    half = float(t.ppf(0.975, count - 1)) * spread
    mean = float(np.mean(scores))
    return {"value": mean, "interval95": [mean - half, mean + half]}


def wilson_interval(correct: int, total: int) -> dict[str, Any]:
    """A proportion with Wilson's 95 % score interval: for one fixed test set.

    Returns:
        {"value": proportion, "interval95": [low, high]}.
    """
    z = 1.959964
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return {"value": share, "interval95": [centre - half, centre + half]}
