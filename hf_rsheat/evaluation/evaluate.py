"""Evaluate a Hub folder on a folder of labelled images and write the JSON that model cards read."""

import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageClassification

from ..errors import ConfigurationError, DataError
from ..hub.records import weights_digest
from ..training.image_folder import scan_classes
from .features import (
    FeatureExtractor,
    choose_modality,
    collect,
    default_device,
    histograms,
    load_extractor,
    untrained_like,
)
from .statistics import PROBES, corrected_interval, cross_validate, require_sklearn, wilson_interval

TASKS = (*PROBES, "classify")
_UNTRAINED_SEEDS = (0, 1, 2)
_PACKAGES = ("hf_rsheat", "torch", "transformers", "scikit-learn", "numpy", "pillow")


def evaluate(
    model_dir: str | Path,
    data_folder: str | Path,
    task: str = "knn",
    folds: int = 5,
    repeats: int = 5,
    k: int = 5,
    baselines: bool = True,
    output_json: str | Path | None = None,
    *,
    batch_size: int = 32,
    modality: str | None = None,
    dataset_name: str | None = None,
) -> dict[str, Any]:
    """Measure a model on images sorted into one sub-folder per class.

    Tasks `knn` and `linear` probe frozen features in repeated stratified cross-validation and set them beside the
    untrained network (mean of three seeds) and colour and gradient histograms, each with the paired difference.
    Task `classify` scores an image classifier whose labels are the names of the sub-folders.

    Args:
        model_dir: Hub folder or id; it must bring its image processor.
        data_folder: one sub-folder per class. Unreadable images are left out and listed in the result.
        task: one of `TASKS`.
        folds: parts of each split, at least 2 and at most the size of the smallest class.
        repeats: how often the images are split anew.
        k: neighbours that vote, for `knn`.
        baselines: also measure the baselines.
        output_json: file to write the result to.
        batch_size: images per forward pass.
        modality: which sensor the images come from (default: optical, or the only one).
        dataset_name: name in the result, for a folder called `train` or the like (default: the folder's name).

    Returns:
        What is written to `output_json`: task, protocol, dataset, model, metrics and baselines with 95 % intervals.

    Raises:
        ConfigurationError: unknown task or modality, or numbers out of range.
        DataError: the folder has no classes, too few images, or class names the classifier does not know.
        MissingExtraError: scikit-learn is not installed.
    """
    require_sklearn()
    if task not in TASKS:
        raise ConfigurationError(f"Task {task!r} is not known: choose one of {', '.join(TASKS)}.")
    if folds < 2 or repeats < 1 or k < 1:
        raise ConfigurationError("Cross-validation needs folds of at least 2, repeats and k of at least 1.")
    samples, classes = scan_classes(Path(data_folder), modality or "optical")
    labels = {sample.files[0][1]: int(sample.label or 0) for sample in samples}
    data = _Labelled(Path(data_folder), labels, classes, batch_size)
    if task == "classify":
        result = _classify(str(model_dir), data, modality)
    else:
        result = _probe_model(load_extractor(str(model_dir), None, modality), data, task, folds, repeats, k, baselines)
    settings = (
        "" if task == "classify" else f" --folds {folds} --repeats {repeats}" + (f" --k {k}" if task == "knn" else "")
    )
    # Folder names only: the result goes into public model cards, where nobody's directories belong.
    name = Path(model_dir).resolve().name if Path(model_dir).is_dir() else str(model_dir)
    folder = Path(data_folder).resolve().name
    result = {
        "task": task,
        "model": {"name": name, "weights_sha256": weights_digest(model_dir), **result.pop("model")},
        "dataset": {"name": dataset_name or folder, **result.pop("dataset")},
        **result,
        "versions": package_versions(_PACKAGES),
        "command": f"hf-rsheat evaluate {name} --data {folder} --task {task}{settings}",
    }
    if output_json is not None:
        Path(output_json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


class _Labelled:
    """Images with labels, and the features of all of them by one means or another."""

    def __init__(self, root: Path, labels: dict[str, int], classes: Sequence[str], batch_size: int) -> None:
        self.root, self.labels, self.classes, self.batch_size = root, labels, list(classes), batch_size

    def features(self, compute: Any, title: str) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, str]]:
        found = collect(compute, list(self.labels), root=self.root, batch_size=self.batch_size, title=title)
        self.labels = {path: self.labels[path] for path in found.paths}  # what follows keeps to the readable ones
        return found.vectors, np.array(list(self.labels.values())), found.unreadable

    def describe(self, labels: NDArray[np.int64], unreadable: dict[str, str]) -> dict[str, Any]:
        counts = Counter(labels.tolist())
        if empty := [name for i, name in enumerate(self.classes) if not counts[i]]:
            raise DataError(f"No image of {', '.join(empty)} can be read: repair or remove these sub-folders.")
        return {
            "images": len(labels),
            "classes": {name: counts[i] for i, name in enumerate(self.classes)},
            "unreadable": unreadable,
        }


def _probe_model(
    extractor: FeatureExtractor, data: _Labelled, task: str, folds: int, repeats: int, k: int, baselines: bool
) -> dict[str, Any]:
    vectors, labels, unreadable = data.features(extractor, "model")
    dataset = data.describe(labels, unreadable)
    ours = cross_validate(vectors, labels, task, folds, repeats, k)
    result: dict[str, Any] = {
        "model": describe_model(extractor.model),
        "dataset": dataset,
        "protocol": _protocol(task, folds, repeats, k),
        "metrics": {name: corrected_interval(scores, folds) for name, scores in ours.items()},
        "baselines": {},
    }
    if not baselines:
        return result
    runs = [
        cross_validate(
            data.features(untrained_like(extractor, seed), f"untrained {seed}")[0], labels, task, folds, repeats, k
        )
        for seed in _UNTRAINED_SEEDS
    ]
    untrained = {name: np.mean([run[name] for run in runs], axis=0).tolist() for name in ours}
    simple = cross_validate(data.features(histograms, "histograms")[0], labels, task, folds, repeats, k)
    for baseline, theirs in (("untrained network", untrained), ("colour and gradient histogram", simple)):
        result["baselines"][baseline] = {
            name: {
                **corrected_interval(theirs[name], folds),
                "model_minus_baseline": corrected_interval(np.subtract(scores, theirs[name]).tolist(), folds),
            }
            for name, scores in ours.items()
        }
    result["baselines"]["untrained network"]["seeds"] = list(_UNTRAINED_SEEDS)
    return result


def _protocol(task: str, folds: int, repeats: int, k: int) -> str:
    probe = f"{k}-nearest-neighbour (cosine)" if task == "knn" else "logistic regression"
    return (
        f"{probe} on standardised frozen features; {repeats} times {folds}-fold stratified cross-validation; "
        "95 % corrected resampled t intervals (Nadeau and Bengio 2003), differences paired by fold"
    )


def _classify(model_dir: str, data: _Labelled, modality: str | None) -> dict[str, Any]:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    trunk = load_extractor(model_dir, None, modality)
    model = AutoModelForImageClassification.from_pretrained(model_dir).to(default_device()).eval()
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if unknown := sorted(set(data.classes) - set(names)):
        raise DataError(f"The classifier has no label {', '.join(unknown)}: its labels are {', '.join(names)}.")
    classifier = replace(trunk, model=model, modality=choose_modality(model.config, modality))

    @torch.inference_mode()
    def logits(images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return model(**classifier.inputs(images)).logits.float().cpu().numpy()

    scores, labels, unreadable = data.features(logits, "classifier")
    dataset = data.describe(labels, unreadable)
    truth = np.array([names.index(data.classes[label]) for label in labels])
    predicted = scores.argmax(1)
    seen = sorted({*truth.tolist(), *predicted.tolist()})
    rates = precision_recall_fscore_support(truth, predicted, labels=seen, zero_division=0)
    return {
        "model": describe_model(model),
        "dataset": dataset,
        "protocol": "predictions on every image of the folder; Wilson's 95 % interval",
        "metrics": {"accuracy": wilson_interval(int((truth == predicted).sum()), len(truth))},
        "per_class": {
            names[index]: {"precision": float(p), "recall": float(r), "f1": float(f), "images": int(n)}
            for index, p, r, f, n in zip(seen, *rates, strict=True)
        },
        "confusion": {
            "labels": [names[index] for index in seen],
            "rows_true_columns_predicted": confusion_matrix(truth, predicted, labels=seen).tolist(),
        },
    }


def describe_model(model: Any) -> dict[str, Any]:
    """What a result says of the model it was measured on."""
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "revision": getattr(model.config, "_commit_hash", None),
    }


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed versions by package name; None where one is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(result: dict[str, Any]) -> str:
    """The result of `evaluate` as a few lines of text for people."""
    dataset = result["dataset"]
    lines = [f"{result['task']} on {dataset['name']}: {dataset['images']} images, {len(dataset['classes'])} classes"]
    for metric, score in result["metrics"].items():
        lines.append(f"  {metric:<10} {_percent(score)}  this model")
        for name, baseline in result.get("baselines", {}).items():
            difference = _percent(baseline[metric]["model_minus_baseline"], sign=True)
            lines.append(f"  {'':<10} {_percent(baseline[metric])}  {name}; this model is {difference} points away")
    for name, rates in result.get("per_class", {}).items():
        lines.append(
            f"  {name:<20} precision {rates['precision']:6.1%}  recall {rates['recall']:6.1%}  {rates['images']} images"
        )
    if dataset["unreadable"]:
        lines.append(f"  {len(dataset['unreadable'])} unreadable images were left out")
    return "\n".join(lines)


def _percent(score: dict[str, Any], sign: bool = False) -> str:
    low, high = score["interval95"]
    plus = "+" if sign else ""
    return f"{100 * score['value']:{plus}.1f} [{100 * low:{plus}.1f}, {100 * high:{plus}.1f}]"
