"""COCO's numbers are COCO's, and matching tells found, missed and invented objects apart."""

import copy
import sys

import numpy as np
import pytest

from hf_rsheat.errors import MissingExtraError
from hf_rsheat.evaluation.coco_metrics import SUMMARY, average_precision, confusion, match
from hf_rsheat.models.coco_annotations import mask_to_run_lengths

SIZE = 160


def rectangle(left, top, width, height):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def thing(box, label=0, image=1, number=1, iscrowd=0):
    runs = mask_to_run_lengths(rectangle(*box))
    area = float(box[2] * box[3])
    fields = {"bbox": [float(v) for v in box], "area": area, "iscrowd": iscrowd, "segmentation": runs}
    return {"id": number, "image_id": image, "category_id": label, **fields}


def detection(box, label=0, score=0.9, image=1):
    runs = mask_to_run_lengths(rectangle(*box))
    return {
        "image_id": image,
        "category_id": label,
        "score": score,
        "bbox": [float(v) for v in box],
        "segmentation": runs,
    }


def listing(annotations, images=1, classes=("ship", "building")):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }


@pytest.fixture
def random_results():
    """20 images, two classes, small to large objects, a crowd; detections jittered, doubled, invented and missing."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, 21):
        for _ in range(int(rng.integers(0, 6))):
            side = int(rng.integers(6, 110))
            left, top = (int(v) for v in rng.integers(0, SIZE - side, 2))
            height, label = max(3, int(side * rng.uniform(0.4, 1))), int(rng.integers(2))
            crowd = int(rng.random() < 0.1)
            annotations.append(thing((left, top, side, height), label, image, len(annotations) + 1, crowd))
            for _ in range(int(rng.integers(0, 3))):
                shift = rng.integers(-3, 4, 2)
                x, y = (int(v) for v in np.clip(np.array([left, top]) + shift, 0, SIZE - side))
                results.append(detection((x, y, side, height), label, round(float(rng.random()), 3), image))
        if rng.random() < 0.5:
            results.append(detection((2, 2, 20, 20), int(rng.integers(2)), round(float(rng.random()), 3), image))
    return listing(annotations, 20), results


def test_average_precision_agrees_with_pycocotools(random_results):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval

    truth, results = random_results
    ours, classes = average_precision(truth, results)
    for kind, iou_type, dropped in (("mask", "segm", "bbox"), ("box", "bbox", "segmentation")):
        reference = coco.COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        found = reference.loadRes([{k: v for k, v in item.items() if k != dropped} for item in results])
        run = COCOeval(reference, found, iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
        for name, expected in zip(SUMMARY.values(), run.stats[:6], strict=True):
            assert ours[f"{kind}_{name}"] == pytest.approx(expected, abs=1e-9), (kind, name)
        for index, name in enumerate(("ship", "building")):
            precision = run.eval["precision"][:, :, index, 0, -1]
            assert classes[name][f"{kind}_ap"] == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
    assert 0.05 < ours["mask_ap"] < 0.95


def test_perfect_and_absent_detections_are_one_and_zero():
    truth = listing([thing((10, 10, 40, 40))])
    perfect, classes = average_precision(truth, [detection((10, 10, 40, 40))])
    assert perfect["mask_ap"] == perfect["box_ap50"] == pytest.approx(1)
    assert "mask_ap_s" not in perfect  # no small objects: nothing to say
    assert list(classes) == ["ship"]
    nothing, _ = average_precision(truth, [])
    assert nothing["mask_ap"] == nothing["box_ap"] == 0


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(MissingExtraError, match=r"hf_rsheat\[eval\]"):
        average_precision(listing([]), [])


def test_each_object_is_found_once_by_the_best_detection():
    objects = [thing((10, 10, 40, 40)), thing((80, 80, 30, 30), number=2)]
    found = [detection((12, 10, 40, 40), score=0.5), detection((10, 10, 40, 40), score=0.8), detection((0, 90, 20, 20))]
    matches = match(objects, found)
    assert matches.pairs == [(0, 1)]
    assert matches.missed == [1]
    assert sorted(matches.extra) == [0, 2]


def test_a_crowd_is_neither_missed_nor_does_it_make_detections_false():
    objects = [thing((0, 0, 100, 100), iscrowd=1), thing((120, 120, 30, 30), number=2)]
    matches = match(objects, [detection((10, 10, 20, 20)), detection((120, 20, 20, 20))])
    assert matches.missed == [1]
    assert matches.extra == [1]


def test_the_confusion_table_has_a_row_and_a_column_for_background():
    objects = [thing((10, 10, 40, 40), 0), thing((80, 80, 30, 30), 1, number=2)]
    found = [detection((10, 10, 40, 40), 1), detection((100, 10, 20, 20), 0)]
    table = confusion([(objects, found), ([], []), ([], [detection((5, 5, 9, 9), 1)]), (objects, [])], 2)
    assert table.tolist() == [[0, 1, 1], [0, 0, 2], [1, 1, 0]]
