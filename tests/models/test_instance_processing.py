"""COCO annotations become labels, and a detector's output becomes objects of the original image."""

import sys

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from transformers.utils import ModelOutput

from hf_rsheat import RS4DImageProcessor, RS4DImageProcessorPil
from hf_rsheat.models import coco_annotations
from hf_rsheat.models.coco_annotations import MaskLibraryError, mask_to_run_lengths, segmentation_to_mask
from hf_rsheat.models.image_checks import ImageFormatError

BOTH = pytest.mark.parametrize("processor_class", [RS4DImageProcessor, RS4DImageProcessorPil])
SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]  # 20 x 20 px at (10, 20)


def picture(height: int = 50, width: int = 100) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def thing(segmentation=None, box=(10, 20, 20, 20), label=1, **fields):
    return {"category_id": label, "segmentation": segmentation or [SQUARE], "bbox": list(box), **fields}


def labels_of(processor, *things, size=(50, 100), **options):
    annotation = {"image_id": 7, "annotations": list(things)}
    batch = processor(picture(*size), annotations=annotation, return_tensors="pt", **options)
    return batch["labels"][0]


def outputs(boxes, scores, labels, masks) -> ModelOutput:
    """What RS4DForInstanceSegmentation returns for one image."""
    return ModelOutput(
        pred_boxes=torch.tensor([boxes], dtype=torch.float32).reshape(1, -1, 4),
        scores=torch.tensor([scores], dtype=torch.float32),
        class_labels=torch.tensor([labels], dtype=torch.int64),
        pred_masks=torch.as_tensor(masks, dtype=torch.float32)[None],
    )


@BOTH
def test_labels_follow_the_image_into_the_padded_input(processor_class):
    label = labels_of(processor_class(size=64), thing())
    assert label["class_labels"].tolist() == [1]
    # 50 x 100 px become 32 x 64 of 64 x 64: left 6.4, top 12.8, sides 12.8 px.
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.2, 0.3, 0.2, 0.2]]))
    assert label["masks"].shape == (1, 64, 64)
    assert label["masks"].dtype == torch.bool
    rows, columns = (label["masks"][0].any(axis).nonzero().flatten() for axis in (1, 0))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (13, 26, 6, 19)
    assert label["area"].item() == label["masks"].sum() == 13 * 13
    assert label["iscrowd"].tolist() == [0]
    assert label["image_id"].tolist() == [7]
    assert label["orig_size"].tolist() == [50, 100]
    assert label["size"].tolist() == [64, 64]


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask():
    polygon = [[12.3, 5.1, 40.2, 9.9, 33.0, 44.4]]
    expected = coco_mask.decode(coco_mask.frPyObjects(polygon, 50, 100))[..., 0].astype(bool)
    compressed = mask_to_run_lengths(expected)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], expected.T.ravel(), [0]]))) + 0
    counts = np.diff(np.concatenate([[0], runs, [expected.size]])).tolist()
    uncompressed = {"size": [50, 100], "counts": counts}
    for segmentation in (polygon, compressed, uncompressed):
        assert np.array_equal(segmentation_to_mask(segmentation, 50, 100), expected)


def test_masks_agree_with_pycocotools_to_the_bit():
    reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(0)
    for _ in range(20):
        polygon = rng.uniform(-5, 55, (1, 10)).tolist()
        expected = reference.decode(reference.merge(reference.frPyObjects(polygon, 50, 50))).astype(bool)
        found = segmentation_to_mask(polygon, 50, 50)
        assert np.array_equal(found, expected)
        assert np.array_equal(reference.decode(mask_to_run_lengths(found)).astype(bool), expected)


def test_crowds_specks_and_boxes_outside_leave_no_label():
    crowd = thing(iscrowd=1)
    outside = thing([[-30, 5, -10, 5, -10, 20]], (-30, 5, 20, 15))
    line = thing([[5, 5, 20, 5]], (5, 5, 15, 0))
    label = labels_of(RS4DImageProcessor(size=64), crowd, outside, line, thing(label=2))
    assert label["class_labels"].tolist() == [2]


def test_an_object_across_the_border_is_cut_there():
    label = labels_of(
        RS4DImageProcessor(size=(100, 100)), thing([[80, 10, 130, 10, 130, 30, 80, 30]], (80, 10, 50, 20))
    )
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.9, 0.2, 0.2, 0.2]]))
    assert label["masks"][0, 10:30, 80:].all()


@BOTH
def test_images_without_objects_have_empty_labels_of_the_right_shapes(processor_class):
    label = labels_of(processor_class(size=64))
    assert label["class_labels"].shape == (0,)
    assert label["class_labels"].dtype == torch.int64
    assert label["boxes"].shape == (0, 4)
    assert label["masks"].shape == (0, 64, 64)


def test_an_object_of_one_pixel_is_kept_when_nothing_shrinks_it_away():
    speck = thing([[3, 4, 4, 4, 4, 5, 3, 5]], (3, 4, 1, 1))
    label = labels_of(RS4DImageProcessor(size=(50, 100)), speck)
    assert label["masks"].sum() == 1
    assert label["masks"][0, 4, 3]
    torch.testing.assert_close(label["boxes"] * torch.tensor([100, 50] * 2), torch.tensor([[3.5, 4.5, 1, 1]]))


def test_a_missing_box_is_that_of_the_mask():
    item = thing()
    del item["bbox"]
    label = labels_of(RS4DImageProcessor(size=(50, 100)), item)
    torch.testing.assert_close(label["boxes"] * torch.tensor([100.0, 50] * 2), torch.tensor([[20.0, 30, 20, 20]]))


def test_annotations_that_do_not_fit_are_refused():
    processor = RS4DImageProcessor(size=64)
    with pytest.raises(ImageFormatError, match="do not fit an image of 50x100"):
        labels_of(processor, thing({"size": [100, 50], "counts": [5000]}))
    with pytest.raises(ImageFormatError, match="no segmentation"):
        labels_of(processor, {"category_id": 0, "bbox": [0, 0, 5, 5]})
    with pytest.raises(ImageFormatError, match="pass one for each"):
        processor([picture(), picture()], annotations={"image_id": 0, "annotations": []})
    with pytest.raises(ImageFormatError, match="is not COCO's"):
        labels_of(processor, thing("1 2 3"))
    for polygon in ([0, 0, 9, 0, 9, 9, 3], [0, 0, 1e12, 0, 9, 9], [0, 0, float("nan"), 0, 9, 9]):
        with pytest.raises(ImageFormatError, match="no outline in pixels"):
            labels_of(processor, thing([polygon]))
    maps = np.zeros((50, 100), dtype=np.uint8)
    with pytest.raises(ImageFormatError, match="pass one of them"):
        processor(picture(), segmentation_maps=maps, annotations={"image_id": 0, "annotations": []})


def test_without_a_mask_library_the_error_names_the_extra(monkeypatch):
    for library in ("faster_coco_eval.core", "pycocotools"):
        monkeypatch.setitem(sys.modules, library, None)
    coco_annotations.coco_mask.cache_clear()
    with pytest.raises(MaskLibraryError, match=r"hf_rsheat\[eval\]"):
        labels_of(RS4DImageProcessor(size=64), thing())
    with pytest.raises(MaskLibraryError, match=r"hf_rsheat\[eval\]"):
        mask_to_run_lengths(np.ones((2, 2), dtype=bool))


def test_labels_and_results_are_inverse():
    """What the processor reads from COCO, a perfect detector gives back through it."""
    processor = RS4DImageProcessor(size=128)
    annotation = {"image_id": 0, "annotations": [thing([[10, 8, 70, 20, 60, 45, 15, 40]], (10, 8, 60, 37))]}
    label = processor(picture(), annotations=annotation, return_tensors="pt")["labels"][0]
    centre, sides = label["boxes"][:, :2] * 128, label["boxes"][:, 2:] * 128
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], 1)
    masks = label["masks"][:, None].float()
    quarter = torch.nn.functional.avg_pool2d(masks, 4)[:, 0]
    found = outputs(boxes.tolist(), [0.9], [1], quarter)
    (result,) = processor.post_process_instance_segmentation(found, target_sizes=[(50, 100)], return_binary_maps=True)
    expected = torch.from_numpy(segmentation_to_mask(annotation["annotations"][0]["segmentation"], 50, 100))
    union, both = (result["segmentation"][0] | expected).sum(), (result["segmentation"][0] & expected).sum()
    assert both / union > 0.95
    torch.testing.assert_close(
        torch.tensor(result["segments_info"][0]["box"]), torch.tensor([10.0, 8, 70, 45]), atol=1e-4, rtol=0
    )


def test_masks_inside_boxes_fill_exactly_their_boxes():
    found = outputs([[6.4, 12.8, 19.2, 25.6], [0, 0, 0, 0]], [0.9, 0], [1, -1], np.ones((2, 28, 28)))
    (result,) = RS4DImageProcessor(size=64).post_process_instance_segmentation(found, target_sizes=[(50, 100)])
    expected = torch.full((50, 100), -1)
    expected[20:40, 10:30] = 0
    assert torch.equal(result["segmentation"], expected.int())
    (segment,) = result["segments_info"]
    assert segment["box"] == pytest.approx([10, 20, 30, 40], abs=1e-4)
    assert {name: segment[name] for name in ("id", "label_id", "was_fused", "score")} == {
        "id": 0,
        "label_id": 1,
        "was_fused": False,
        "score": pytest.approx(0.9),
    }


def test_masks_over_the_image_lose_their_padding():
    mask = np.zeros((16, 16))
    mask[:8, 8:] = 1  # right half of a 50 x 100 image
    mask[8:] = 1  # padding
    found = outputs([[32, 0, 64, 64]], [0.9], [0], mask[None])
    (result,) = RS4DImageProcessor(size=64).post_process_instance_segmentation(found, target_sizes=[(50, 100)])
    assert result["segmentation"].shape == (50, 100)
    assert result["segmentation"][:, 52:].eq(0).all()
    assert result["segmentation"][:, :48].eq(-1).all()


def test_boxes_are_cut_at_the_image_and_not_at_the_padding():
    """The original clips to the padded canvas, and its paste can crash on a box beyond the image."""
    found = outputs([[32, 16, 80, 60], [0, 40, 64, 64]], [0.9, 0.8], [0, 0], np.ones((2, 28, 28)))
    processor = RS4DImageProcessor(size=64)
    (boxes,) = processor.post_process_object_detection(found, target_sizes=[(50, 100)])
    torch.testing.assert_close(boxes["boxes"][0], torch.tensor([50.0, 25, 100, 50]))
    (result,) = processor.post_process_instance_segmentation(found, target_sizes=[(50, 100)])
    assert [info["id"] for info in result["segments_info"]] == [0]
    (binary,) = processor.post_process_instance_segmentation(found, target_sizes=[(50, 100)], return_binary_maps=True)
    assert binary["segmentation"].flatten(1).any(1).tolist() == [True, False]


def test_better_objects_lie_on_top_and_hidden_ones_are_left_out_on_request():
    found = outputs([[0, 0, 20, 20], [10, 0, 30, 20], [0, 0, 10, 10]], [0.9, 0.8, 0.7], [0, 1, 2], np.ones((3, 28, 28)))
    processor = RS4DImageProcessor(size=64)
    (result,) = processor.post_process_instance_segmentation(found, target_sizes=[(64, 64)])
    assert [info["label_id"] for info in result["segments_info"]] == [0, 1]  # the third is hidden wholly
    assert (result["segmentation"] == 0).sum() == 400
    assert (result["segmentation"] == 1).sum() == 200
    (strict,) = processor.post_process_instance_segmentation(
        found, target_sizes=[(64, 64)], overlap_mask_area_threshold=0.5
    )
    assert [info["label_id"] for info in strict["segments_info"]] == [0]
    (few,) = processor.post_process_instance_segmentation(found, threshold=0.85, target_sizes=[(64, 64)])
    assert len(few["segments_info"]) == 1


def test_run_lengths_are_cocos_own():
    found = outputs([[6.4, 12.8, 19.2, 25.6]], [0.9], [1], np.ones((1, 28, 28)))
    (result,) = RS4DImageProcessor(size=64).post_process_instance_segmentation(
        found, target_sizes=[(50, 100)], return_coco_annotation=True
    )
    (runs,) = result["segmentation"]
    assert runs["size"] == [50, 100]
    assert coco_mask.area([runs]).tolist() == [400]


def test_an_image_without_detections_is_all_background():
    processor = RS4DImageProcessor(size=64)
    for found in (outputs([], [], [], np.zeros((0, 28, 28))), outputs([[0] * 4], [0], [-1], np.zeros((1, 28, 28)))):
        (result,) = processor.post_process_instance_segmentation(found, threshold=0.0, target_sizes=[(50, 100)])
        assert result["segmentation"].eq(-1).all()
        assert result["segments_info"] == []
        (binary,) = processor.post_process_instance_segmentation(
            found, threshold=0.0, target_sizes=[(50, 100)], return_binary_maps=True
        )
        assert binary["segmentation"].shape == (0, 50, 100)


def test_masks_of_a_doubtful_size_need_the_layout():
    found = outputs([[0, 0, 112, 112]], [0.9], [0], np.ones((1, 28, 28)))
    with pytest.raises(ImageFormatError, match="mask_layout"):
        RS4DImageProcessor(size=112).post_process_instance_segmentation(found, target_sizes=[(112, 112)])
    with pytest.raises(ImageFormatError, match="mask_layout"):
        RS4DImageProcessor(size=112, mask_layout="both").post_process_instance_segmentation(found)
    for layout in ("box", "image"):
        processor = RS4DImageProcessor(size=112, mask_layout=layout)
        (result,) = processor.post_process_instance_segmentation(found, target_sizes=[(112, 112)])
        assert result["segmentation"].eq(0).float().mean() > 0.999  # corners of a box mask fade


def test_the_layout_travels_with_the_processor(tmp_path):
    RS4DImageProcessor(mask_layout="image").save_pretrained(tmp_path)
    assert RS4DImageProcessor.from_pretrained(tmp_path).mask_layout == "image"
    assert RS4DImageProcessorPil.from_pretrained(tmp_path).mask_layout == "image"


@BOTH
def test_the_pixel_mask_shows_where_the_image_is(processor_class):
    images = [picture(50, 100), picture(64, 64)]
    mask = processor_class(size=64, return_pixel_mask=True)(images, return_tensors="pt")["pixel_mask"]
    assert mask.shape == (2, 64, 64)
    assert mask[0, :32].eq(1).all()
    assert mask[0, 32:].eq(0).all()
    assert mask[1].eq(1).all()
    assert "pixel_mask" not in processor_class(size=64)(images, return_tensors="pt")


def test_maps_of_a_semantic_model_are_segments_too():
    """The image-segmentation pipeline asks a processor for instances first, whatever the model."""
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 1, :, 2:] = 5
    (result,) = RS4DImageProcessor(size=64).post_process_instance_segmentation(
        ModelOutput(logits=logits), target_sizes=[(64, 64)]
    )
    assert [(info["label_id"], info["was_fused"], info["score"]) for info in result["segments_info"]] == [
        (0, True, None),
        (1, True, None),
    ]
    assert (result["segmentation"][:, :20] == 0).all()
    assert (result["segmentation"][:, 44:] == 1).all()


def test_target_sizes_must_match_the_images():
    found = outputs([[0, 0, 10, 10]], [0.9], [0], np.ones((1, 28, 28)))
    with pytest.raises(ImageFormatError, match="pass one for each"):
        RS4DImageProcessor(size=64).post_process_instance_segmentation(found, target_sizes=[(10, 10)] * 2)
    with pytest.raises(ImageFormatError, match="exclude"):
        RS4DImageProcessor(size=64).post_process_instance_segmentation(
            found, return_coco_annotation=True, return_binary_maps=True
        )
