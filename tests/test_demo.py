"""The demo end to end in miniature, and how it treats folders and images of others."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_rsheat.demo import DemoSettings, _pretrain, _take_images, _tiles, run
from hf_rsheat.errors import ConfigurationError, DataError

TINY = DemoSettings(
    image_size=32,
    scene_size=32,
    pairs=2,
    singles=2,
    steps=2,
    batch_size=2,
    hidden_sizes=(8, 8, 8, 8),
    depths=(1, 1, 1, 1),
)


@pytest.fixture
def photos(tmp_path):
    """Images of a user: any size and mode, one 16-bit, one damaged, one large scene."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    for name, shape in (("a.png", (40, 70, 3)), ("b.jpg", (90, 33, 3)), ("deep/large.tif", (600, 800, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / name)
    Image.fromarray(rng.integers(0, 255, (50, 50, 4), np.uint8)).save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 9000, (50, 50), np.uint16)).save(folder / "sixteen.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_own_images_end_in_a_hub_folder_and_a_picture_and_a_second_run_reuses_the_training(photos, tmp_path, capfd):
    output = tmp_path / "demo"
    picture = run(photos, output, TINY)
    with Image.open(picture) as image:
        assert image.width == 1600
    hub = output / "run" / "hub"
    config = json.loads((hub / "config.json").read_text())
    assert config["modalities"] == {"optical": 3}
    assert {"model.safetensors", "preprocessor_config.json", "README.md"} <= {path.name for path in hub.iterdir()}
    printed = capfd.readouterr().out
    assert f"Hub folder: {hub}" in printed
    assert "trust_remote_code=True" in printed
    assert str(picture) in printed
    assert "loaded as transformers_modules" in printed
    log = (output / "run" / "log.jsonl").read_text()
    assert len(log.splitlines()) == TINY.steps
    _pretrain(output, TINY, ["optical"])
    assert (output / "run" / "log.jsonl").read_text() == log


def test_user_images_become_tiles_and_unusable_ones_are_named(photos, tmp_path, capsys):
    sensors, example = _take_images(photos, tmp_path, TINY)
    tiles = {path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.png")}
    assert {"a-000.png", "b-000.png", "alpha-000.png"} < tiles
    assert sum(name.startswith("deep/large-") for name in tiles) == 6
    assert sensors == ["optical"]
    with Image.open(example) as image:
        assert image.mode == "RGB"
    told = "".join(capsys.readouterr())
    assert "broken.jpg" in told
    assert "sixteen.png" in told


def test_folders_named_like_sensors_give_both_sensors_and_tiles_that_still_pair(tmp_path):
    for sensor, mode in (("optical", "RGB"), ("sar", "L")):
        (tmp_path / "own" / sensor).mkdir(parents=True)
        Image.new(mode, (520, 520)).save(tmp_path / "own" / sensor / "place.png")
    sensors, example = _take_images(tmp_path / "own", tmp_path, TINY)
    assert sensors == ["optical", "sar"]
    names = [{path.name for path in (tmp_path / "images" / sensor).iterdir()} for sensor in sensors]
    assert names[0] == names[1]
    assert Image.open(example).mode == "RGB"


def test_images_outside_the_sensors_folders_count_as_optical(tmp_path):
    (tmp_path / "own" / "sar").mkdir(parents=True)
    Image.new("L", (40, 40)).save(tmp_path / "own" / "sar" / "radar.png")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "own" / "photo.png")
    sensors, example = _take_images(tmp_path / "own", tmp_path, TINY)
    assert sensors == ["optical", "sar"]
    assert Image.open(example).mode == "RGB"


def test_tiles_of_a_large_scene_keep_to_the_limit(tmp_path):
    Image.new("RGB", (1024, 768)).save(tmp_path / "a.png")
    tiles = list(_tiles(tmp_path / "a.png", limit=5))
    assert 1 <= len(tiles) <= 5
    assert {tile.size for tile in tiles} == {(256, 256)}


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="can be used"):
        run(tmp_path / "own", tmp_path / "demo", TINY)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "precious.png").write_bytes(b"1")
    with pytest.raises(ConfigurationError, match="choose another"):
        run(None, tmp_path, TINY)
    assert (tmp_path / "images" / "precious.png").exists()
