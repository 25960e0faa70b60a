"""The generated scenes: repeatable, plausible to both sensors, with objects where they say they are."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.scenes import KINDS, make_scene, write_labelled_scenes, write_scenes


def _inside(scene, label):
    mask = Image.new("1", scene.sar.shape[::-1])
    for thing in scene.objects:
        if thing.label == label:
            ImageDraw.Draw(mask).polygon([coordinate for point in thing.polygon for coordinate in point], fill=1)
    return np.asarray(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_scene_has_the_documented_shape_type_and_contrast(kind):
    scene = make_scene(64, 3, kind)
    assert scene.kind == kind
    assert scene.optical.shape == (64, 64, 3)
    assert scene.sar.shape == (64, 64)
    assert scene.optical.dtype == scene.sar.dtype == np.uint8
    assert scene.optical.std() > 4
    assert scene.sar.std() > 4


def test_same_seed_gives_the_same_bytes_in_another_process():
    program = (
        "import hashlib; from hf_rsheat.scenes import KINDS, make_scene\n"
        "scenes = [make_scene(48, (7, i), k) for i, k in enumerate(KINDS)]\n"
        "print(hashlib.sha256(b''.join(s.optical.tobytes() + s.sar.tobytes() for s in scenes)).hexdigest())"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    scenes = [make_scene(48, (7, index), kind) for index, kind in enumerate(KINDS)]
    here = hashlib.sha256(b"".join(scene.optical.tobytes() + scene.sar.tobytes() for scene in scenes)).hexdigest()
    assert child.stdout.strip() == here


def test_different_seeds_give_different_scenes_and_naming_the_drawn_kind_changes_nothing():
    first, second = make_scene(48, 1), make_scene(48, 2, make_scene(48, 1).kind)
    assert not np.array_equal(first.optical, second.optical)
    assert np.array_equal(first.optical, make_scene(48, 1, first.kind).optical)


def test_every_kind_is_drawn_when_the_seed_chooses():
    assert {make_scene(32, seed).kind for seed in range(40)} == set(KINDS)


@pytest.mark.parametrize("seed", range(4))
def test_ships_lie_inside_the_image_and_shine_on_dark_radar_water(seed):
    scene = make_scene(128, seed, "open_water")
    assert scene.objects
    assert {thing.label for thing in scene.objects} == {"ship"}
    corners = np.concatenate([np.array(thing.polygon) for thing in scene.objects])
    assert corners.min() >= 0
    assert corners.max() <= 128
    ships = _inside(scene, "ship")
    assert scene.sar[ships].mean() > 4 * scene.sar[~ships].mean()


def test_residential_and_harbor_scenes_list_buildings_and_ships():
    houses = make_scene(128, 5, "residential").objects
    assert len(houses) > 5
    assert {thing.label for thing in houses} == {"building"}
    labels = [thing.label for seed in range(4) for thing in make_scene(128, seed, "harbor").objects]
    assert {"ship", "building"} == set(labels)


def test_radar_water_has_four_look_speckle():
    """Intensity of L-look speckle over even ground has a squared mean-to-spread ratio of L."""
    intensity = make_scene(128, (1, 0), "open_water").sar[:, :].astype(float) ** 2
    patches = [intensity[i : i + 16, j : j + 16] for i in range(0, 128, 16) for j in range(0, 128, 16)]
    looks = np.median([patch.mean() ** 2 / patch.var() for patch in patches])
    assert 2.5 < looks < 5


def test_write_scenes_writes_co_registered_pairs_with_equal_stems(tmp_path):
    folder = write_scenes(tmp_path / "scenes", 7, 32, seed=4)
    optical, sar = (sorted(path.name for path in (folder / name).iterdir()) for name in ("optical", "sar"))
    assert optical == sar
    assert len(optical) == 7
    listing = json.loads((folder / "objects.json").read_text())
    assert [listing[name]["kind"] for name in optical] == [*KINDS, KINDS[0]]
    with Image.open(folder / "optical" / optical[1]) as image, Image.open(folder / "sar" / sar[1]) as radar:
        assert (image.mode, radar.mode, image.size) == ("RGB", "L", (32, 32))
        assert np.array_equal(np.asarray(image), make_scene(32, (4, 1), KINDS[1]).optical)


def test_labelled_scenes_come_in_one_folder_per_kind(tmp_path):
    folder = write_labelled_scenes(tmp_path, len(KINDS) * 2, 32)
    assert {path.name: len(list(path.iterdir())) for path in folder.iterdir()} == dict.fromkeys(KINDS, 2)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [({"size": 16}, "at least 32"), ({"kind": "moon"}, "farmland"), ({"seed": -1}, "from 0 on")],
)
def test_unusable_arguments_are_refused_with_advice(arguments, advice):
    with pytest.raises(ConfigurationError, match=advice):
        make_scene(**arguments)
