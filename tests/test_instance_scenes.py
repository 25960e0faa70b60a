"""Generated scenes for instance segmentation: what is listed is what is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.instance_scenes import CLASSES, make_instance_scene, write_instance_scenes
from hf_rsheat.models.coco_annotations import segmentation_to_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_instance_scenes(tmp_path_factory.mktemp("scenes"), train=4, test=2, size=128)


def test_the_same_seed_gives_the_same_bytes():
    first, objects = make_instance_scene(128, (3, 1), "ship")
    again, same = make_instance_scene(128, (3, 1), "ship")
    other, _ = make_instance_scene(128, (3, 2), "ship")
    assert np.array_equal(first, again)
    assert objects == same
    assert not np.array_equal(first, other)


def test_the_files_are_coco(folder):
    for split, count in (("train", 4), ("test", 2)):
        listing = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert [entry["name"] for entry in listing["categories"]] == list(CLASSES)
        assert len(listing["images"]) == count
        assert len({thing["id"] for thing in listing["annotations"]}) == len(listing["annotations"]) >= count
        for thing in listing["annotations"]:
            mask = segmentation_to_mask(thing["segmentation"], 128, 128)
            assert mask.sum() == pytest.approx(thing["area"], rel=0.15, abs=8)
            left, top, width, height = thing["bbox"]
            assert 0 <= left <= left + width <= 128
            assert 0 <= top <= top + height <= 128


def test_objects_are_of_the_promised_sizes(folder):
    things = json.loads((folder / "annotations" / "train.json").read_text())["annotations"]
    inside = [t["bbox"] for t in things if min(t["bbox"][:2]) > 0 and max(np.add(t["bbox"][:2], t["bbox"][2:])) < 128]
    assert all(10 <= max(width, height) <= 75 for _, _, width, height in inside)


def test_ships_are_brighter_than_the_speckled_water(folder):
    listing = json.loads((folder / "annotations" / "train.json").read_text())
    entry = listing["images"][0]
    pixels = np.asarray(Image.open(folder / "train" / entry["file_name"]))[..., 0].astype(float)
    ships = np.zeros((128, 128), dtype=bool)
    for thing in listing["annotations"]:
        if thing["image_id"] == entry["id"]:
            assert thing["category_id"] == 1
            ships |= segmentation_to_mask(thing["segmentation"], 128, 128)
    assert pixels[ships].mean() > 2 * pixels[~ships].mean()
    assert pixels[~ships].std() > 0.2 * pixels[~ships].mean()  # speckle


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigurationError, match="at least 96"):
        make_instance_scene(64)
    with pytest.raises(ConfigurationError, match="choose one of ship, building"):
        make_instance_scene(128, 0, "car")
