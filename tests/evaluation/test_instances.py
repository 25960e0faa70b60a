"""Evaluation of detectors: the JSON holds what a model card needs, in numbers of the original images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import ModelOutput

from hf_rsheat import RS4DConfig, RS4DForInstanceSegmentation, RS4DImageProcessor, RS4DInstanceConfig
from hf_rsheat.errors import ConfigurationError, DataError
from hf_rsheat.evaluation.detect import detect
from hf_rsheat.evaluation.instances import evaluate_instances, report_instances
from hf_rsheat.hub.card import add_evaluation
from hf_rsheat.hub.export import export, finish
from hf_rsheat.instance_scenes import CLASSES, write_instance_scenes
from hf_rsheat.models.coco_annotations import segmentation_to_mask
from hf_rsheat.training.coco import CocoData, CocoImage


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_instance_scenes(tmp_path_factory.mktemp("data"), train=1, test=3, size=128)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    config = RS4DInstanceConfig(
        backbone_config=RS4DConfig(hidden_size=16, inner_size=20, num_hidden_layers=2, state_size=4, image_size=64),
        feature_size=16,
        aggregator_size=8,
        fc_size=16,
        mask_num_convs=1,
        rpn_max_per_img=20,
        max_per_img=8,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    processor = RS4DImageProcessor(size=64, return_pixel_mask=True, mask_layout="box")
    return export(RS4DForInstanceSegmentation(config), processor, tmp_path_factory.mktemp("hub") / "detector")


def evaluate(detector, scenes, **options):
    return evaluate_instances(detector, scenes / "annotations" / "test.json", scenes / "test", **options)


def test_the_result_names_data_model_protocol_and_scores(detector, scenes, tmp_path):
    path, picture = tmp_path / "result.json", tmp_path / "sheet.png"
    result = evaluate(detector, scenes, output_json=path, picture=picture, score_threshold=0.0)
    assert json.loads(path.read_text()) == result
    assert result["task"] == "instances"
    assert result["dataset"]["images"] == 3
    assert result["dataset"]["objects"] == sum(result["dataset"]["classes"].values())
    assert {"mask_ap", "mask_ap50", "mask_ap75", "box_ap"} <= set(result["metrics"])
    assert set(result["per_class"]) == set(CLASSES)
    assert result["versions"]["faster-coco-eval"]
    assert str(scenes.parent) not in path.read_text()
    table = np.array(result["confusion"]["rows_true_columns_predicted"])
    assert result["confusion"]["labels"] == [*CLASSES, "background"]
    assert table[:-1].sum() == result["dataset"]["objects"]
    assert min(Image.open(picture).size) > 300
    assert "AP50" in report_instances(result)


def test_the_card_shows_the_scores(detector, scenes, tmp_path):
    path = tmp_path / "result.json"
    result = evaluate(detector, scenes, output_json=path)
    add_evaluation(detector, path)
    finish(detector)
    card = (detector / "README.md").read_text()
    assert f"| test (3 images) | instances | mask_ap50 | {result['metrics']['mask_ap50']['value']:.3f} |" in card
    assert "type: image-segmentation" in card


def test_unreadable_images_are_left_out_of_the_truth_too(detector, scenes, tmp_path):
    listing = json.loads((scenes / "annotations" / "test.json").read_text())
    for entry in listing["images"]:
        (tmp_path / entry["file_name"]).write_bytes((scenes / "test" / entry["file_name"]).read_bytes())
    broken = listing["images"][0]
    (tmp_path / broken["file_name"]).write_bytes(b"not an image")
    result = evaluate_instances(detector, scenes / "annotations" / "test.json", tmp_path)
    assert result["dataset"]["images"] == 2
    assert list(result["dataset"]["unreadable"]) == [broken["file_name"]]
    left = [thing for thing in listing["annotations"] if thing["image_id"] != broken["id"]]
    assert result["dataset"]["objects"] == len(left)


def test_wrong_folders_and_classes_are_named(detector, scenes, tmp_path):
    listing = json.loads((scenes / "annotations" / "test.json").read_text())
    listing["categories"][0]["name"] = "lighthouse"
    (tmp_path / "other.json").write_text(json.dumps(listing))
    with pytest.raises(DataError, match="lighthouse"):
        evaluate_instances(detector, tmp_path / "other.json", scenes / "test")
    listing["categories"][0]["name"] = CLASSES[0]
    listing["annotations"][0].pop("segmentation")
    (tmp_path / "boxes.json").write_text(json.dumps(listing))
    with pytest.raises(DataError, match="no usable outline"):
        evaluate_instances(detector, tmp_path / "boxes.json", scenes / "test")
    with pytest.raises(ConfigurationError, match="no instance segmentation model"):
        evaluate_instances(tmp_path, tmp_path / "other.json", scenes / "test")
    with pytest.raises(ConfigurationError, match="score_threshold"):
        evaluate(detector, scenes, score_threshold=2.0)


class _Oracle(torch.nn.Module):
    """Says where one object is: left half of a 100 x 50 image, of which it sees 64 x 32 of 64 x 64 pixels."""

    config = SimpleNamespace(mask_layout="box", mask_threshold=0.5)
    device = torch.device("cpu")

    def forward(self, pixel_values, pixel_mask):
        assert pixel_mask.sum() == 64 * 32
        return ModelOutput(
            pred_boxes=torch.tensor([[[0.0, 0, 32, 40], [0, 0, 0, 0]]]),
            scores=torch.tensor([[0.9, 0.0]]),
            class_labels=torch.tensor([[1, -1]]),
            pred_masks=torch.ones(1, 2, 28, 28),
        )


def test_detections_are_in_pixels_of_the_original_image(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    data = CocoData(("a", "b"), (CocoImage(5, "a.png", 50, 100, ()),), tmp_path)
    processor = RS4DImageProcessor(size=64)
    oracle = _Oracle().train()
    (found,), unreadable = detect(oracle, processor, data)
    assert oracle.training
    assert processor.mask_layout is None  # the caller's processor is as it was
    assert unreadable == {}
    assert (found["image_id"], found["category_id"], found["score"]) == (5, 1, pytest.approx(0.9))
    assert found["bbox"] == pytest.approx([0, 0, 50, 50])  # cut at the image, not at the padding
    mask = segmentation_to_mask(found["segmentation"], 50, 100)
    assert mask[2:-2, 2:48].all()
    assert not mask[:, 52:].any()


def test_the_image_segmentation_pipeline_finds_objects(detector, scenes):
    segmenter = pipeline("image-segmentation", model=str(detector))
    found = segmenter(str(scenes / "test" / "scene_00000.png"), threshold=0.0)
    assert found
    for item in found:
        assert item["label"] in CLASSES
        assert 0 < item["score"] <= 1
        assert item["mask"].size == (128, 128)
        assert np.asarray(item["mask"]).max() == 255
