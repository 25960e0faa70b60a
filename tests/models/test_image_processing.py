"""Promises of the image processors: right pixel values, or a refusal that names the argument to pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import transforms

import hf_rsheat
from hf_rsheat.models.image_checks import ImageFormatError
from hf_rsheat.models.image_processing_pil_rs_vheat import RSVHeatImageProcessorPil
from hf_rsheat.models.image_processing_pil_vheat import VHeatImageProcessorPil
from hf_rsheat.models.image_processing_rs_vheat import RSVHeatImageProcessor
from hf_rsheat.models.image_processing_vheat import VHeatImageProcessor

VHEAT = [VHeatImageProcessor, VHeatImageProcessorPil]
RS_VHEAT = [RSVHeatImageProcessor, RSVHeatImageProcessorPil]
ALL = VHEAT + RS_VHEAT
TWINS = [VHEAT, RS_VHEAT]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int = 60, width: int = 80, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth uint8 image (height, width, channels) with some texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
    bands = [np.array(PIL.Image.fromarray(coarse[..., c]).resize((width, height), 3)) for c in range(channels)]
    noisy = np.stack(bands, axis=-1).astype(np.int16) + rng.integers(-9, 10, (height, width, channels))
    return noisy.clip(0, 255).astype(np.uint8)


def pixels(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs).pixel_values


U8 = picture()


def for_bands(cls, count: int, **options):
    """A processor of either family for `count` bands with mean 0 and std 1."""
    statistics = {"image_mean": [0.0] * count, "image_std": [1.0] * count}
    if issubclass(cls, tuple(VHEAT)):
        return cls(**statistics, **options)
    return cls(modalities={"optical": statistics}, **options)


# --- the published preprocessing


@pytest.mark.parametrize("size", [(60, 80), (333, 100), (51, 77), (300, 301)])
def test_vheat_pil_equals_the_evaluation_transform_of_the_original(size):
    image = PIL.Image.fromarray(picture(*size))
    original = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    torch.testing.assert_close(pixels(VHeatImageProcessorPil(), image)[0], original(image), atol=1e-5, rtol=0)


def test_rs_vheat_pil_equals_the_transform_of_the_original():
    image = PIL.Image.fromarray(picture(61, 83))
    original = transforms.Compose(
        [
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    torch.testing.assert_close(pixels(RSVHeatImageProcessorPil(), image)[0], original(image), atol=1e-5, rtol=0)


STORED = {  # dtype -> (uint8 picture as stored values, the options they need)
    "uint8": (lambda image: image, {}),
    "uint16": (lambda image: image.astype(np.uint16) * 39, {"rescale_factor": 1 / 10000}),
    "int16": (lambda image: image.astype(np.int16) * 39, {"rescale_factor": 1 / 10000}),
    "int32": (lambda image: image.astype(np.int32) * 257, {"rescale_factor": 1 / 65535}),
    "float16": (lambda image: (image / 255).astype(np.float16), {"do_rescale": False}),
    "float32": (lambda image: image.astype(np.float32), {"rescale_factor": 1 / 255}),
    "float64": (lambda image: image / 255, {"do_rescale": False}),
}


@pytest.mark.parametrize("twins", TWINS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_twins_agree_within_resampling_error(twins, dtype, bands):
    convert, options = STORED[dtype]
    image = convert(picture(90, 75, bands))
    first, second = (pixels(for_bands(cls, bands, size=48), image, **options) for cls in twins)
    assert first.shape == (1, bands, 48, 48)
    assert first.dtype == torch.float32
    # Each library rounds uint8 bands to 1/255 after each of its two passes; floats are not rounded at all.
    assert (first - second).abs().mean() < (2e-4 if dtype == "uint8" else 1e-6)
    assert (first - second).abs().max() < (2.01 / 255 if dtype == "uint8" else 1e-5)


# --- every kind of input gives the same pixel values


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", STORED)
def test_every_dtype_gives_the_pixel_values_of_uint8(cls, dtype):
    image, (convert, options) = picture(), STORED[dtype]
    exact = 39 * 255 / 10000 if "rescale_factor" in options and options["rescale_factor"] == 1 / 10000 else 1.0
    processor = for_bands(cls, 3, do_resize=False, do_center_crop=False)
    expected = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 * exact
    torch.testing.assert_close(pixels(processor, convert(image), **options), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 10, 16])
def test_layout_is_found_from_the_channel_count(cls, bands):
    processor, image = for_bands(cls, bands, size=32), picture(channels=bands)
    last = pixels(processor, image)
    assert last.shape == (1, bands, 32, 32)
    assert torch.equal(last, pixels(processor, image.transpose(2, 0, 1)))
    assert torch.equal(last, pixels(processor, torch.from_numpy(image).permute(2, 0, 1)))
    assert torch.equal(last, pixels(processor, image[None]))
    assert torch.equal(last, pixels(processor, image, input_data_format="channels_last"))


@pytest.mark.parametrize("cls", ALL)
def test_lists_may_mix_types_and_sizes(cls):
    images = [PIL.Image.fromarray(picture(40, 50)), picture(33, 64), torch.from_numpy(picture(70, 41)).permute(2, 0, 1)]
    processor = cls(size=32)
    batch = pixels(processor, images)
    assert batch.shape == (3, 3, 32, 32)
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(pixels(processor, image)[0], row)


@pytest.mark.parametrize("cls", ALL)
def test_odd_memory_layouts_of_arrays_are_read_correctly(cls):
    processor, image = for_bands(cls, 3, size=32, rescale_factor=1 / 10000), picture().astype(np.uint16) * 39
    expected = pixels(processor, image[:, ::-1].copy())
    flipped = image[:, ::-1].astype(">u2")
    flipped.flags.writeable = False
    assert torch.equal(pixels(processor, flipped), expected)
    assert torch.equal(pixels(processor, image[:, ::-1]), expected)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])
def test_torch_tensors_equal_numpy_arrays(cls, dtype):
    processor, image = for_bands(cls, 3, size=32, rescale_factor=1 / 10000), picture().astype(np.uint16) * 39
    tensor = torch.from_numpy(image).permute(2, 0, 1).to(dtype)
    assert torch.equal(pixels(processor, tensor), pixels(processor, image))


@pytest.mark.parametrize("cls", ALL)
def test_input_is_never_modified(cls):
    image = torch.rand(3, 32, 32)
    before = image.clone()
    pixels(cls(size=32, do_center_crop=False), image, do_rescale=False)
    assert torch.equal(image, before)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_8_bit_pil_modes_become_rgb(cls, mode):
    image = PIL.Image.fromarray(picture()).convert(mode)
    assert torch.equal(pixels(cls(size=32), image), pixels(cls(size=32), image.convert("RGB")))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_8_bit_pil_modes_become_grey_for_one_channel(cls, mode):
    image = PIL.Image.fromarray(picture()).convert(mode)
    processor = for_bands(cls, 1, size=32)
    assert torch.equal(pixels(processor, image), pixels(processor, np.array(image.convert("L"))))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("I", np.int32), ("F", np.float32)])
def test_wide_pil_modes_keep_their_values(cls, mode, dtype):
    values = (picture(channels=1)[..., 0].astype(np.float32) * 39).astype(dtype)
    image = PIL.Image.fromarray(values)
    assert image.mode == mode
    processor = for_bands(cls, 1, size=32, rescale_factor=1 / 10000)
    assert torch.equal(pixels(processor, image), pixels(processor, values))
    with pytest.raises(ImageFormatError, match="image_mean and image_std"):
        pixels(cls(size=32), image, rescale_factor=1 / 10000)


@pytest.mark.parametrize("cls", ALL)
def test_do_convert_rgb_false_keeps_four_bands(cls):
    image = PIL.Image.fromarray(picture(channels=4), mode="RGBA")
    assert pixels(for_bands(cls, 4, size=32, do_convert_rgb=False), image).shape[1] == 4
    with pytest.raises(ImageFormatError, match="4"):
        pixels(cls(size=32, do_convert_rgb=False), image)


# --- geometry


@pytest.mark.parametrize("cls", VHEAT)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"size": 48}, (48, 48)),
        ({"size": {"height": 40, "width": 64}}, (40, 64)),
        ({"size": {"shortest_edge": 48}}, (48, 48)),
        ({"size": {"shortest_edge": 48}, "do_center_crop": False}, (48, 64)),
        ({"size": {"shortest_edge": 48}, "crop_size": 32}, (32, 32)),
        ({"size": 48, "crop_size": {"height": 40, "width": 30}}, (40, 30)),
        ({"size": 48, "do_center_crop": False}, (48, 48)),
        ({"do_resize": False, "size": 48}, (48, 48)),
        ({"do_resize": False, "do_center_crop": False}, (60, 80)),
    ],
)
def test_size_crop_size_and_crop_pct_mean_what_they_say(cls, options, shape):
    assert pixels(cls(**options), U8).shape[-2:] == shape


@pytest.mark.parametrize("cls", ALL)
def test_padding_and_lists_serve_batches_of_mixed_sizes(cls):
    processor, images = cls(do_resize=False, do_center_crop=False), [U8, picture(40, 90)]
    assert pixels(processor, images, do_pad=True).shape == (2, 3, 60, 90)
    listed = processor(images)["pixel_values"]
    assert [tuple(image.shape) for image in listed] == [(3, 60, 80), (3, 40, 90)]
    assert isinstance(listed[0], np.ndarray if cls.__name__.endswith("Pil") else torch.Tensor)


@pytest.mark.parametrize("cls", VHEAT)
def test_crop_pct_out_of_range_is_refused(cls):
    with pytest.raises(ImageFormatError, match="crop_pct"):
        pixels(cls(crop_pct=1.5), U8)


# --- RS-vHeat's sensors


@pytest.mark.parametrize("cls", RS_VHEAT)
def test_sar_has_one_channel_and_its_own_statistics(cls):
    image = picture(channels=1)[..., 0]
    values = pixels(cls(do_resize=False), image, modality="sar")
    torch.testing.assert_close(values[0, 0], (torch.from_numpy(image) / 255 - 0.5) / 0.25)
    with pytest.raises(ImageFormatError, match='modality="sar"'):
        pixels(cls(), image)


@pytest.mark.parametrize("cls", RS_VHEAT)
def test_a_third_sensor_is_one_more_entry(cls, tmp_path):
    sensor = {"image_mean": np.full(10, 0.2), "image_std": [1] * 10, "rescale_factor": 1e-4, "value_range": (0, 2)}
    image = picture(channels=10).astype(np.uint16) * 70
    processor = cls(size=32, modalities={"msi": sensor, **cls.modalities})
    assert processor.modality == "msi"  # the first entry; kept although the saved file sorts them
    values = pixels(processor, image)
    assert values.shape == (1, 10, 32, 32)
    processor.save_pretrained(tmp_path)
    reloaded = cls.from_pretrained(tmp_path)
    assert torch.equal(pixels(reloaded, image), values)
    assert torch.equal(pixels(reloaded, U8, modality="optical"), pixels(cls(size=32), U8))


@pytest.mark.parametrize("cls", RS_VHEAT)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_mean": [0.5], "image_std": [0.5]}, "modalities="),
        ({"modalities": {"sar": {"image_mean": [0.5]}}}, "one value per channel"),
        ({"modalities": {"sar": {"image_mean": [0.5], "image_std": [0.5], "mean": 1}}}, "mean"),
        ({"modality": "lidar"}, "optical, sar"),
    ],
)
def test_inconsistent_sensors_are_refused_when_the_processor_is_built(cls, options, message):
    with pytest.raises(ImageFormatError, match=message):
        cls(**options)


# --- segmentation


@pytest.mark.parametrize("cls", ALL)
def test_segmentation_maps_follow_their_images(cls):
    label = np.zeros((60, 80), np.uint8)
    label[:, 40:] = 200
    image = np.repeat(label[..., None], 3, axis=-1)
    for maps in ([label], label, PIL.Image.fromarray(label), label[None]):
        batch = cls(size=32)([image], segmentation_maps=maps, return_tensors="pt")
        assert batch["labels"].shape == (1, 32, 32)
        assert batch["labels"].dtype == torch.int64
        assert set(batch["labels"].unique().tolist()) == {0, 200}
        bright = batch["pixel_values"][0, 0] > 0
        assert (bright == (batch["labels"][0] == 200)).float().mean() > 0.98


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.zeros((60, 81), np.uint8), "does not fit its image"),
        (np.zeros((60, 80), np.float32), "integer"),
        ([np.zeros((60, 80), np.uint8)] * 2, "one for each"),
    ],
)
def test_unfitting_segmentation_maps_are_refused(cls, label, message):
    with pytest.raises(ImageFormatError, match=message):
        cls(size=32)(U8, segmentation_maps=label, return_tensors="pt")


@pytest.mark.parametrize("cls", ALL)
def test_post_processing_gives_one_map_per_image_in_its_size(cls):
    logits = torch.zeros(2, 4, 8, 8)
    logits[0, 3], logits[1, 2, :, 4:] = 1, 1
    outputs = SimpleNamespace(logits=logits)
    plain = cls().post_process_semantic_segmentation(outputs)
    assert [tuple(item.shape) for item in plain] == [(8, 8), (8, 8)]
    maps = cls().post_process_semantic_segmentation(outputs, target_sizes=[(20, 30), (9, 7)])
    assert [tuple(item.shape) for item in maps] == [(20, 30), (9, 7)]
    assert (maps[0] == 3).all()
    assert maps[1][0].tolist() == [0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(ImageFormatError, match="target_sizes"):
        cls().post_process_semantic_segmentation(outputs, target_sizes=[(20, 30)])


# --- saving, and travelling without this package


@pytest.mark.parametrize("cls", ALL)
def test_reloaded_processor_gives_identical_tensors(cls, tmp_path):
    options = {"size": {"height": 40, "width": 56}, "value_range": None, "resample": 2, "do_convert_rgb": False}
    processor = cls(**options)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == options["size"]
    reloaded = cls.from_pretrained(tmp_path)
    assert reloaded.value_range is None
    assert reloaded.to_dict() == processor.to_dict()
    assert torch.equal(pixels(reloaded, U8), pixels(processor, U8))


@pytest.mark.parametrize("twins", TWINS)
def test_both_twins_read_the_same_file(twins, tmp_path):
    torchvision_class, pil_class = twins
    pil_class(size=40).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == torchvision_class.__name__
    assert torchvision_class.from_pretrained(tmp_path).to_dict() == pil_class.from_pretrained(tmp_path).to_dict()


CHILD = """
import sys
sys.modules["torchvision"] = sys.modules["hf_rsheat"] = None
import numpy as np
from transformers import AutoImageProcessor
for folder in sys.argv[1:]:
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    values = processor(np.full((40, 50, 3), 128, np.uint8), return_tensors="pt").pixel_values
    print(type(processor).__name__, *values.shape)
"""


def test_processors_load_without_this_package_and_without_torchvision(tmp_path):
    models = Path(hf_rsheat.__file__).parent / "models"
    for name, cls in (("vheat", VHeatImageProcessor), ("rs_vheat", RSVHeatImageProcessor)):
        folder = tmp_path / name
        cls(size=32).save_pretrained(folder)
        for file in models.glob("image_*.py"):
            shutil.copy(file, folder)
        config = json.loads((folder / "preprocessor_config.json").read_text())
        pil = f"image_processing_pil_{name}.{cls.__name__}Pil"
        twins = {"torchvision": f"image_processing_{name}.{cls.__name__}", "pil": pil}
        config["auto_map"] = {"AutoImageProcessor": twins}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "vheat"), str(tmp_path / "rs_vheat")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["VHeatImageProcessorPil 1 3 32 32", "RSVHeatImageProcessorPil 1 3 32 32"]
