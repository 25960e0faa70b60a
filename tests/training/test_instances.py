"""Instance segmentation from COCO files: data, augmentation, objective, and what the loop makes of them."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.ops import masks_to_boxes

from hf_rsheat import RS4DBackbone, RS4DConfig, RS4DImageProcessor
from hf_rsheat.errors import CheckpointError, ConfigurationError, DataError
from hf_rsheat.models.coco_annotations import read_annotation
from hf_rsheat.training.augmentation import ScaleJitter
from hf_rsheat.training.coco import load_coco, read_coco
from hf_rsheat.training.coco_layouts import LAYOUTS, find_layout
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.randomness import generator
from hf_rsheat.training.sampler import BatchPlan

from .conftest import BACKBONE, DETECTOR


@pytest.fixture
def objective(make_instances):
    return get_objective("instances")(make_instances())


def read(objective, indices, epoch=0):
    reader = BatchReader(Path(objective.recipe.image_folder), objective.samples, objective, objective.recipe.seed)
    return reader[BatchPlan(0, epoch, 0, 1, "optical", tuple(indices))]


def write_listing(coco, path, change) -> Path:
    listing = json.loads((coco / "annotations" / "train.json").read_text())
    change(listing)
    path.write_text(json.dumps(listing))
    return path


# --- COCO files


def test_classes_follow_the_named_order_and_not_the_ids(coco, tmp_path):
    def shuffle(listing):
        listing["categories"] = [{"id": 7, "name": "Building"}, {"id": 3, "name": "SHIP"}]
        for thing in listing["annotations"]:
            thing["category_id"] = {1: 3, 2: 7}[thing["category_id"]]

    path = write_listing(coco, tmp_path / "a.json", shuffle)
    data = read_coco(path, coco / "train", find_layout("generated").classes)
    original = read_coco(coco / "annotations" / "train.json", coco / "train")
    assert data.classes == ("ship", "building")
    assert [image.objects[0]["category_id"] for image in data.images] == [
        image.objects[0]["category_id"] for image in original.images
    ]
    assert read_coco(path, coco / "train").classes == ("SHIP", "Building")  # the file's own, by their ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "is no COCO file"),
        (lambda c: c["annotations"][0].update(category_id=9), "objects of 9"),
        (lambda c: c["annotations"][0].update(image_id=99), "which it does not list"),
        (lambda c: c["images"].append(c["images"][0]), "twice"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "1 of 6 images"),
        (lambda c: c["images"].clear() or c["annotations"].clear(), "0 of 0 images"),
    ],
)
def test_files_that_contradict_themselves_are_refused(coco, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_coco(write_listing(coco, tmp_path / "a.json", change), coco / "train")


def test_objects_of_classes_that_the_model_does_not_have_are_refused(coco):
    with pytest.raises(DataError, match="objects of building"):
        read_coco(coco / "annotations" / "train.json", coco / "train", ["ship"])
    with pytest.raises(DataError, match="not all different"):
        read_coco(coco / "annotations" / "train.json", coco / "train", ["ship", "Ship", "building"])


def test_a_row_of_the_dataset_is_an_annotation_for_the_processor(coco):
    rows = load_coco(coco / "annotations" / "train.json", coco / "train")
    assert rows.features["annotations"].feature["category_id"].names == ["ship", "building"]
    labels = RS4DImageProcessor(size=128)(rows[0]["image"], annotations=rows[0])["labels"][0]
    data = read_coco(coco / "annotations" / "train.json", coco / "train")
    expected = read_annotation(data.images[0].annotation, 128, 128)
    assert torch.equal(labels["class_labels"], expected.class_labels)
    assert torch.equal(labels["masks"], expected.masks)


def test_known_data_sets_have_the_published_classes():
    assert LAYOUTS["ssdd"].classes == ("ship",)
    assert LAYOUTS["whu"].classes == ("building",)
    assert LAYOUTS["nwpu"].classes == (
        "airplane",
        "ship",
        "storage_tank",
        "baseball_diamond",
        "tennis_court",
        "basketball_court",
        "ground_track_field",
        "harbor",
        "bridge",
        "vehicle",
    )
    with pytest.raises(ConfigurationError, match="did you mean 'ssdd'"):
        find_layout("sdd")


# --- augmentation


@pytest.fixture
def scene(coco):
    data = read_coco(coco / "annotations" / "train.json", coco / "train")
    return torch.arange(3 * 128 * 128).reshape(3, 128, 128).to(torch.uint8), data.images[0].annotation


def test_boxes_and_masks_stay_on_their_objects(scene):
    image, annotation = scene
    instances = read_annotation(annotation, 128, 128)
    for index in range(20):
        jitter = ScaleJitter.draw(generator("test", index), (128, 128), 96, (0.5, 2.0), 0.5)
        view, moved = jitter.apply(image, instances)
        assert view.shape == (3, *jitter.size)
        assert max(view.shape) <= 96
        assert moved.masks.shape[-2:] == view.shape[-2:]
        if len(moved.boxes):
            # The mask lies in its box; a box cut at the border may be larger than what is left of the mask.
            tight = masks_to_boxes(moved.masks)
            assert (tight[:, :2] >= moved.boxes[:, :2] - 2).all()
            assert (tight[:, 2:] <= moved.boxes[:, 2:] + 2).all()


def test_scale_one_without_a_flip_fits_the_whole_image(scene):
    image, annotation = scene
    instances = read_annotation(annotation, 128, 128)
    jitter = ScaleJitter.draw(generator("test"), (128, 128), 128, (1.0, 1.0), 0.0)
    view, moved = jitter.apply(image, instances)
    assert torch.equal(view, image)
    assert torch.equal(moved.masks, instances.masks)
    assert torch.equal(moved.boxes, instances.boxes)
    mirrored, flipped = ScaleJitter(0, 0, 128, 128, (128, 128), True).apply(image, instances)
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(flipped.masks, instances.masks.flip(-1))
    torch.testing.assert_close(flipped.boxes[:, [0, 2]], 128 - instances.boxes[:, [2, 0]])


def test_scales_cover_the_range_and_elongated_images_are_fitted(scene):
    sizes = [ScaleJitter.draw(generator("test", i), (100, 50), 64, (0.1, 2.0), 0.5).size for i in range(200)]
    assert min(height for height, _ in sizes) < 12
    assert max(height for height, _ in sizes) == 64
    assert max(width for _, width in sizes) == 64


def test_objects_outside_of_the_cut_are_dropped(scene):
    image, annotation = scene
    instances = read_annotation(annotation, 128, 128)
    left, top, right, bottom = (int(v) for v in instances.boxes[0])
    jitter = ScaleJitter(top, left, max(1, bottom - top), max(1, right - left), (32, 32), False)
    _, moved = jitter.apply(image, instances)
    assert 1 <= len(moved.boxes) <= len(instances.boxes)
    assert (moved.boxes[:, 2:] > moved.boxes[:, :2]).all()


# --- the objective


def test_changed_annotations_are_other_data(make_instances, coco, tmp_path, objective):
    path = write_listing(coco, tmp_path / "a.json", lambda c: c["annotations"].pop())
    changed = get_objective("instances")(make_instances(options={"annotations": str(path)}))
    assert changed.samples == objective.samples
    assert changed.data_digest != objective.data_digest


def test_data_may_lie_elsewhere(make_instances, coco, tmp_path):
    options = {
        "annotations": str(coco / "annotations" / "train.json"),
        "images": str(coco / "train"),
        "evaluate": False,
    }
    recipe = make_instances(image_folder=str(tmp_path), objective_options=options)
    loaded = read(get_objective("instances")(recipe), [0])
    assert loaded.images == 1


def test_a_sample_depends_on_seed_epoch_and_index_only(objective):
    torch.manual_seed(1)
    expected = torch.rand(1)
    alone = read(objective, [3]).batch
    torch.manual_seed(1)
    together = read(objective, [1, 3]).batch
    assert torch.equal(torch.rand(1), expected)  # torch's own generator is left alone
    assert torch.equal(alone["pixel_values"][0], together["pixel_values"][1])
    assert torch.equal(alone["labels"][0]["masks"], together["labels"][1]["masks"])
    assert not torch.equal(alone["pixel_values"], read(objective, [3], epoch=1).batch["pixel_values"])


def test_a_batch_is_what_the_model_takes(objective):
    batch = read(objective, [0, 1, 2]).batch
    assert batch["pixel_values"].shape == (3, 3, 96, 96)
    assert batch["pixel_mask"].shape == (3, 96, 96)
    for pixels, mask, label in zip(batch["pixel_values"], batch["pixel_mask"], batch["labels"], strict=True):
        assert pixels[:, mask == 0].eq(0).all()  # padding is the mean colour
        assert not label["masks"][:, mask == 0].any()
        assert label["boxes"].min() >= 0
        assert label["boxes"].max() <= 1


def test_the_terms_are_the_models_loss(objective):
    model = objective.build_model()
    batch = read(objective, [0, 1]).batch
    torch.manual_seed(0)
    terms = objective.loss(model, batch, 0)
    torch.manual_seed(0)
    whole = model(**batch).loss
    assert terms.keys() == objective.term_weights.keys()
    assert {name: count for name, (_, count) in terms.items()} == objective.counts(batch)
    torch.testing.assert_close(sum(total / count for total, count in terms.values()), whole)


def test_a_process_without_data_gets_a_stand_in(objective):
    loaded = read(objective, [])
    assert loaded.images == 0
    assert len(loaded.batch["labels"][0]["boxes"]) == 0
    terms = objective.loss(objective.build_model(), loaded.batch, 0)
    assert all(torch.isfinite(total) for total, _ in terms.values())


def test_images_that_do_not_fit_their_annotations_are_skipped(make_instances, coco, tmp_path):
    path = write_listing(coco, tmp_path / "a.json", lambda c: c["images"][1].update(height=100))
    objective = get_objective("instances")(make_instances(options={"annotations": str(path)}))
    loaded = read(objective, [0, 1])
    assert loaded.images == 1
    assert "128x128 pixels, the annotations are for 100x128" in loaded.skipped[0].reason


def test_a_frozen_backbone_is_not_trained(make_instances):
    model = get_objective("instances")(make_instances(options={"freeze_backbone": True})).build_model()
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    assert all(parameter.requires_grad for parameter in model.box_head.parameters())


def test_wrong_options_are_named(make_instances):
    instances = get_objective("instances")
    with pytest.raises(ConfigurationError, match="did you mean 'ssdd'"):
        instances(make_instances(options={"dataset": "ssd"}))
    with pytest.raises(ConfigurationError, match="scale_range"):
        instances(make_instances(options={"scale_range": [2.0, 0.1]}))
    with pytest.raises(ConfigurationError, match="'annotations'"):
        instances(make_instances(objective_options={}))
    with pytest.raises(ConfigurationError, match="did you mean 'fc_size'"):
        instances(make_instances(model={"fc_sizes": 3}))
    with pytest.raises(ConfigurationError, match="did you mean 'hidden_size'"):
        instances(make_instances(model={"backbone_config": {"hidden_sise": 3}}))
    with pytest.raises(ConfigurationError, match="No detector over 'selective_mae'"):
        instances(make_instances(model={"backbone_config": {"model_type": "selective_mae"}}))


def test_a_detector_starts_from_a_backbone_and_from_a_detector_of_other_classes(make_instances, tmp_path):
    backbone = RS4DBackbone(RS4DConfig(**BACKBONE, image_size=96))
    backbone.save_pretrained(tmp_path / "backbone")
    RS4DImageProcessor(image_mean=[0.4] * 3).save_pretrained(tmp_path / "backbone")
    start = {"pretrained": str(tmp_path / "backbone"), **DETECTOR}
    objective = get_objective("instances")(make_instances(model=start))
    model = objective.build_model()
    for name, value in backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    assert list(objective.processor.image_mean) == [0.4] * 3

    model.save_pretrained(tmp_path / "detector")
    objective.processor.save_pretrained(tmp_path / "detector")
    options = {
        "dataset": None,
        "annotations": "annotations/train.json",
        "images": "train",
        "classes": ["building", "ship", "car"],
    }
    again = get_objective("instances")(make_instances(model=str(tmp_path / "detector"), options=options)).build_model()
    assert again.config.id2label == {0: "building", 1: "ship", 2: "car"}
    assert torch.equal(
        again.neck.state_dict()[(key := next(iter(again.neck.state_dict())))], model.neck.state_dict()[key]
    )

    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    other_head = {"pretrained": str(tmp_path / "detector"), "head": "prompt", "mask_decoder_config": decoder}
    prompted = get_objective("instances")(make_instances(model=other_head)).build_model()
    assert prompted.config.mask_layout == "image"
    assert torch.equal(prompted.neck.state_dict()[key], model.neck.state_dict()[key])

    small = {**start, "backbone_config": {"num_hidden_layers": 3}}
    with pytest.raises(CheckpointError, match="lacks"):
        get_objective("instances")(make_instances(model=small)).build_model()


def test_a_hierarchical_backbone_brings_its_statistics(make_instances, tmp_path):
    from hf_rsheat import RSVHeatBackbone, RSVHeatConfig, RSVHeatImageProcessor

    config = RSVHeatConfig(image_size=96, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], drop_path_rate=0.0)
    RSVHeatBackbone(config).save_pretrained(tmp_path)
    processor = RSVHeatImageProcessor(size={"height": 96, "width": 96})
    processor.save_pretrained(tmp_path)
    model = {"pretrained": str(tmp_path), **DETECTOR}
    objective = get_objective("instances")(make_instances(model=model))
    assert isinstance(objective.processor, RS4DImageProcessor)
    assert list(objective.processor.image_mean) == list(processor.modalities["optical"]["image_mean"])
    assert objective.build_model().config.is_hierarchical


def test_evaluation_measures_all_processes_together(objective):
    model = objective.build_model().eval()
    torch.manual_seed(0)
    whole = objective.evaluate(model, slice(None), lambda items: items)
    results = []
    for rank in range(2):
        objective.evaluate(model, slice(rank, None, 2), lambda items: results.append(items) or items)
    parts = [items for items in results if items and isinstance(items[0], dict)]

    def gather(items):
        return [item for part in parts for item in part] if items and isinstance(items[0], dict) else items

    assert objective.evaluate(model, slice(0, None, 2), gather) == whole
    assert "mask_ap50" in whole


def test_the_prompt_head_starts_from_a_sam(make_instances, tmp_path):
    from transformers import SamConfig, SamMaskDecoderConfig, SamModel

    decoder = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_dim": 16,
        "iou_head_hidden_dim": 16,
        "num_hidden_layers": 1,
    }
    sam = SamModel(
        SamConfig(
            mask_decoder_config=SamMaskDecoderConfig(**decoder),
            prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 16, "mask_input_channels": 4},
            vision_config={
                "hidden_size": 8,
                "output_channels": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "image_size": 32,
                "num_pos_feats": 8,
            },
        )
    )
    sam.save_pretrained(tmp_path)
    head = {"head": "prompt", "mask_decoder_config": decoder, "rcnn_num_samples": 4}
    recipe = make_instances(model={"backbone_config": BACKBONE, **DETECTOR, **head}, options={"sam": str(tmp_path)})
    objective = get_objective("instances")(recipe)
    model = objective.build_model()
    assert torch.equal(model.mask_head.no_mask_embed.weight, sam.prompt_encoder.no_mask_embed.weight)
    assert objective.processor.mask_layout == "image"
    with pytest.raises(ConfigurationError, match="sam"):
        get_objective("instances")(make_instances(options={"sam": str(tmp_path)})).build_model()
