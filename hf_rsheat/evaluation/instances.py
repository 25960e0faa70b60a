"""Evaluate an instance segmentation model on a COCO file and write the JSON that model cards read."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation

from ..errors import ConfigurationError, DataError
from ..hub.records import weights_digest
from ..training.coco import CocoData, read_coco
from .coco_metrics import KINDS, average_precision, confusion, require_coco
from .contact_sheet import contact_sheet
from .detect import detect
from .evaluate import describe_model, package_versions
from .features import default_device

TASK = "instances"
_PACKAGES = ("hf_rsheat", "torch", "torchvision", "transformers", "faster-coco-eval", "numpy", "pillow")


def evaluate_instances(
    model_dir: str | Path,
    annotations: str | Path,
    images: str | Path,
    output_json: str | Path | None = None,
    *,
    picture: str | Path | None = None,
    score_threshold: float = 0.5,
    batch_size: int = 4,
    dataset_name: str | None = None,
) -> dict[str, Any]:
    """Measure an instance segmentation model on the images of a COCO file.

    Args:
        model_dir: Hub folder or id; it must bring its image processor.
        annotations: COCO file of the objects; its category names are the model's labels, in any order.
        images: Folder that its file names are relative to. Unreadable images are left out and listed in the result.
        output_json: File to write the result to.
        picture: PNG to write: found objects, misses and false detections of the images with most errors.
        score_threshold: Detections of at least this score count for the confusion table and the picture. Average
            precision takes all that the model returns.
        batch_size: Images per forward pass.
        dataset_name: Name in the result (default: that of the COCO file).

    Returns:
        What is written to `output_json`: task, protocol, dataset, model, box and mask AP, AP50, AP75 and AP by size,
        the same per class, and a confusion table with background.

    Raises:
        ConfigurationError: The model has no instance head, or `score_threshold` is no probability.
        DataError: The COCO file cannot be used, its classes are not the model's, or no image can be read.
        MissingExtraError: faster-coco-eval is not installed.
    """
    require_coco()
    if not 0 <= score_threshold <= 1:
        raise ConfigurationError(f"score_threshold must be within 0 and 1, not {score_threshold}.")
    model, processor = _load(model_dir)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    data = read_coco(Path(annotations), Path(images), names)
    data.as_coco()  # an outline that cannot be used is better found before the model has run
    found, unreadable = detect(model, processor, data, batch_size, title="images")
    data = replace(data, images=tuple(image for image in data.images if image.path not in unreadable))
    if not data.images:
        raise DataError(f"No image of {images} can be read: {next(iter(unreadable.values()))}.")
    # Names only: the result goes into public model cards, where nobody's directories belong.
    name = Path(model_dir).resolve().name if Path(model_dir).is_dir() else str(model_dir)
    result = {
        "task": TASK,
        "model": {"name": name, "weights_sha256": weights_digest(model_dir), **describe_model(model)},
        "dataset": {"name": dataset_name or Path(annotations).stem, **_describe(data, unreadable)},
        **_measure(data, found, score_threshold, Path(picture) if picture else None),
        "versions": package_versions(_PACKAGES),
        "command": f"hf-rsheat evaluate {name} --data {Path(annotations).name} --images {Path(images).resolve().name}",
    }
    if output_json is not None:
        Path(output_json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _load(model_dir: str | Path) -> tuple[Any, Any]:
    try:
        model = AutoModelForInstanceSegmentation.from_pretrained(model_dir)
        processor = AutoImageProcessor.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"'{model_dir}' holds no instance segmentation model with its image processor: {error}"
        ) from error
    return model.to(default_device()), processor


def _describe(data: CocoData, unreadable: dict[str, str]) -> dict[str, Any]:
    counts = Counter(thing["category_id"] for image in data.images for thing in image.objects)
    return {
        "images": len(data.images),
        "objects": sum(counts.values()),
        "classes": {name: counts[index] for index, name in enumerate(data.classes)},
        "unreadable": unreadable,
    }


def _measure(data: CocoData, found: Sequence[dict[str, Any]], threshold: float, picture: Path | None) -> dict[str, Any]:
    truth = data.as_coco()
    overall, classes = average_precision(truth, found)
    objects, sure = defaultdict(list), defaultdict(list)
    for thing in truth["annotations"]:
        objects[thing["image_id"]].append(thing)
    for item in found:
        if item["score"] >= threshold:
            sure[item["image_id"]].append(item)
    if picture is not None:
        contact_sheet(data, objects, sure, picture)
    pairs = [(objects[image.image_id], sure[image.image_id]) for image in data.images]
    counts = Counter(thing["category_id"] for thing in truth["annotations"] if not thing["iscrowd"])
    return {
        "protocol": "COCO average precision of masks and boxes, IoU 0.5 to 0.95, at most 100 detections an image",
        "metrics": {name: {"value": value} for name, value in overall.items()},
        "per_class": {
            name: {**classes.get(name, {}), "objects": counts[index]} for index, name in enumerate(data.classes)
        },
        "confusion": {
            "labels": [*data.classes, "background"],
            "score_threshold": threshold,
            "rows_true_columns_predicted": confusion(pairs, len(data.classes)).tolist(),
        },
    }


def report_instances(result: dict[str, Any]) -> str:
    """The result of `evaluate_instances` as a few lines of text for people."""
    dataset, metrics = result["dataset"], result["metrics"]
    lines = [f"instances on {dataset['name']}: {dataset['images']} images, {dataset['objects']} objects"]
    sizes = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")
    lines.append("  " + " " * 20 + "".join(f"{size.replace('_', ' ').upper():>8}" for size in sizes))
    for kind in KINDS:
        values = (metrics.get(f"{kind}_{size}", {}).get("value") for size in sizes)
        lines.append(f"  {kind:<20}" + "".join(_cell(value) for value in values))
    for name, scores in result["per_class"].items():
        cells = "".join(f"  {kind} AP {_cell(scores.get(f'{kind}_ap')).strip()}" for kind in KINDS)
        lines.append(f"  {name:<20}{cells}  {scores['objects']} objects")
    table = result["confusion"]["rows_true_columns_predicted"]
    missed, false = sum(row[-1] for row in table), sum(table[-1])
    threshold = result["confusion"]["score_threshold"]
    lines.append(f"  with a score of at least {threshold:g}: {missed} objects missed, {false} false detections")
    if dataset["unreadable"]:
        lines.append(f"  {len(dataset['unreadable'])} unreadable images were left out")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>8}" if value is None else f"{100 * value:>8.1f}"
