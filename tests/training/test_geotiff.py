import numpy as np
import pytest
import torch

from hf_rsheat.errors import DataError
from hf_rsheat.training.geotiff import read_raster
from hf_rsheat.training.image_folder import decode
from hf_rsheat.training.loop import train

from .conftest import TINY_MODEL, read_log

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write_raster(path, pixels, **options):
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": pixels.dtype, **options}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **profile) as raster:
        raster.write(pixels)


def sentinel(seed=0, bands=5):
    return np.random.default_rng(seed).integers(100, 4000, (bands, 40, 48), dtype=np.uint16)


def test_bands_keep_their_values(tmp_path):
    write_raster(tmp_path / "a.tif", sentinel())
    image = decode(tmp_path / "a.tif", 5)
    assert image.dtype == torch.int32
    assert np.array_equal(image.numpy(), sentinel())
    write_raster(tmp_path / "b.tif", sentinel().astype(np.float32) / 3)
    assert torch.equal(decode(tmp_path / "b.tif", 5), torch.from_numpy(sentinel().astype(np.float32) / 3))


def test_pixels_without_data_get_the_mean_of_their_band(tmp_path):
    pixels = sentinel()
    pixels[:, :10] = 0
    write_raster(tmp_path / "a.tif", pixels, nodata=0)
    image = read_raster(tmp_path / "a.tif", 5)
    assert np.array_equal(image[:, 10:].numpy(), pixels[:, 10:])
    means = pixels[:, 10:].reshape(5, -1).mean(1).astype(int)
    assert (image[:, :10].numpy() == means[:, None, None]).all()
    floats = sentinel().astype(np.float32)
    floats[2, 3, 4] = np.nan
    write_raster(tmp_path / "b.tif", floats)
    assert read_raster(tmp_path / "b.tif", 5).isfinite().all()


def test_rasters_that_cannot_be_used_say_why(tmp_path):
    write_raster(tmp_path / "a.tif", sentinel(bands=4))
    with pytest.raises(DataError, match="has 4 bands, the model expects 5"):
        read_raster(tmp_path / "a.tif", 5)
    write_raster(tmp_path / "b.tif", np.zeros((5, 8, 8), np.uint16), nodata=0)
    with pytest.raises(DataError, match="has no content"):
        read_raster(tmp_path / "b.tif", 5)
    (tmp_path / "c.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read"):
        read_raster(tmp_path / "c.tif", 4)


def test_a_model_of_five_bands_trains_on_rasters_and_lists_the_broken_one(make_recipe, tmp_path):
    for index in range(5):
        write_raster(tmp_path / "msi" / f"{index}.tif", sentinel(index))
    (tmp_path / "msi" / "broken.tif").write_bytes(b"II*\0")
    statistics = {"image_mean": [0.2] * 5, "image_std": [0.1] * 5, "rescale_factor": 1e-4}
    recipe = make_recipe(
        image_folder=str(tmp_path / "msi"),
        model={**TINY_MODEL, "modalities": {"msi": 5}},
        preprocessing={"msi": statistics},
        max_steps=4,
        picture_steps=4,
    )
    train(recipe)
    assert all(np.isfinite(line["loss"]) for line in read_log(recipe.output_dir))
    (skipped,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert '"broken.tif"' in skipped
    assert str(tmp_path) not in skipped
