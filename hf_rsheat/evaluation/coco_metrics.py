"""COCO's average precision, and which objects were found, missed or taken for something else."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

# Names of COCO's summary -> ours; AP is the mean over IoU 0.5 to 0.95, sizes are 32 and 96 px squared.
SUMMARY = {
    "AP_all": "ap",
    "AP_50": "ap50",
    "AP_75": "ap75",
    "AP_small": "ap_s",
    "AP_medium": "ap_m",
    "AP_large": "ap_l",
}
KINDS = {"mask": "segm", "box": "bbox"}


def require_coco() -> None:
    """Refuse early, naming the extra.

    Raises:
        MissingExtraError: faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("faster-coco-eval", "eval", "COCO evaluation") from error


def average_precision(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mask and box average precision as COCO defines them, at most 100 detections per image.

    Args:
        truth: A COCO listing with `images`, `annotations` and `categories`.
        detections: COCO results: `image_id`, `category_id`, `score`, `bbox` and `segmentation` (run lengths).

    Returns:
        Over all classes `mask_ap`, `mask_ap50`, `mask_ap75`, `mask_ap_s`, `mask_ap_m`, `mask_ap_l` and the same for
        `box`, 0 to 1; and per class name `mask_ap`, `mask_ap50`, `box_ap`, `box_ap50`. What has no objects is left out.

    Raises:
        MissingExtraError: faster-coco-eval is not installed.
    """
    require_coco()
    from faster_coco_eval import COCO, COCOeval_faster

    overall: dict[str, float] = {}
    names = [category["name"] for category in truth["categories"]]
    classes: dict[str, dict[str, float]] = {name: {} for name in names}
    for kind, iou_type in KINDS.items():
        reference = COCO(copy.deepcopy(truth))
        # Without boxes COCO takes the area of the mask, which decides whether a false mask counts as small.
        dropped = "bbox" if kind == "mask" else "segmentation"
        results = [{name: value for name, value in found.items() if name != dropped} for found in detections]
        run = COCOeval_faster(reference, reference.loadRes(results), iou_type, print_function=_silent)
        run.run()
        overall |= {f"{kind}_{ours}": run.stats_as_dict[theirs] for theirs, ours in SUMMARY.items()}
        precision = run.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, most detections
        for index, name in enumerate(names):
            classes[name][f"{kind}_ap"] = _mean(precision[:, :, index])
            classes[name][f"{kind}_ap50"] = _mean(precision[0, :, index])
    return _known(overall), {name: scores for name, values in classes.items() if (scores := _known(values))}


def _silent(*_: Any) -> None:
    """COCO's summary is reported in our own words."""


def _mean(precision: NDArray[np.float64]) -> float:
    return float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0


def _known(scores: dict[str, float]) -> dict[str, float]:
    """COCO says -1 where there is nothing to find."""
    return {name: float(value) for name, value in scores.items() if value > -1}


class Matches(NamedTuple):
    """Detections and objects of one image set against each other.

    Args:
        pairs: (object, detection) that overlap enough, whatever their classes.
        missed: Objects without a detection.
        extra: Detections without an object.
    """

    pairs: list[tuple[int, int]]
    missed: list[int]
    extra: list[int]


def match(objects: Sequence[dict[str, Any]], detections: Sequence[dict[str, Any]], least_iou: float = 0.5) -> Matches:
    """Give each detection, best first, the free object whose mask it overlaps most.

    Args:
        objects: COCO objects of one image with run lengths; what lies mostly on a crowd is no extra detection.
        detections: COCO results of the image.
        least_iou: Mask IoU that a pair needs.
    """
    from faster_coco_eval.core import mask as coco_mask

    single = [i for i, thing in enumerate(objects) if not thing["iscrowd"]]
    if not objects or not detections:
        return Matches([], single, list(range(len(detections))))
    crowds = [int(thing["iscrowd"]) for thing in objects]
    found, truth = ([item["segmentation"] for item in side] for side in (detections, objects))
    overlap = np.asarray(coco_mask.iou(found, truth, crowds)).reshape(len(found), len(truth))
    pairs: list[tuple[int, int]] = []
    extra: list[int] = []
    free = set(single)
    for index in sorted(range(len(detections)), key=lambda i: -detections[i]["score"]):
        best = max(free, key=lambda i: overlap[index, i], default=None)
        if best is not None and overlap[index, best] >= least_iou:
            pairs.append((best, index))
            free.remove(best)
        elif not any(crowd and overlap[index, i] >= least_iou for i, crowd in enumerate(crowds)):
            extra.append(index)
    return Matches(pairs, sorted(free), extra)


def confusion(
    images: Sequence[tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]], classes: int
) -> NDArray[np.int64]:
    """Objects by true class (rows) and predicted class (columns); the last row and column are background.

    Args:
        images: Objects and detections of every image, see `match`.
        classes: Number of classes.

    Returns:
        `(classes + 1, classes + 1)` counts: the last column are missed objects, the last row false detections.
    """
    table = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for objects, detections in images:
        matches = match(objects, detections)
        for i, j in matches.pairs:
            table[objects[i]["category_id"], detections[j]["category_id"]] += 1
        for i in matches.missed:
            table[objects[i]["category_id"], classes] += 1
        for j in matches.extra:
            table[classes, detections[j]["category_id"]] += 1
    return table
