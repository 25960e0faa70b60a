import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat.errors import DataError, MissingExtraError
from hf_rsheat.training.image_folder import check_modalities, decode, image_paths, scan_classes, scan_modalities

from .conftest import write_image


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_images_are_found_recursively_sorted_and_nothing_else(tmp_path):
    touch(tmp_path, "b.PNG", "a/x.tiff", "a/deep/y.webp", "notes.txt", ".hidden.png", ".cache/z.png")
    assert image_paths(tmp_path) == ["a/deep/y.webp", "a/x.tiff", "b.PNG"]


def test_symlink_loops_end_and_linked_folders_are_read_once(tmp_path):
    touch(tmp_path, "a/x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert image_paths(tmp_path) == ["a/x.png"]


def test_a_missing_or_empty_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        image_paths(tmp_path / "none")
    with pytest.raises(DataError, match=r"No images below .*\.png"):
        image_paths(tmp_path)


def test_equal_stems_in_modality_folders_are_pairs_wherever_the_folders_are(tmp_path):
    touch(tmp_path, "optical/a.png", "sar/a.tif", "optical/b.png", "sar/c.png", "city/optical/d.jpg", "city/sar/d.png")
    touch(tmp_path, "loose.png")
    samples = {s.files for s in scan_modalities(tmp_path, ["optical", "sar"], "optical")}
    assert samples == {
        (("optical", "optical/a.png"), ("sar", "sar/a.tif")),
        (("optical", "optical/b.png"),),
        (("sar", "sar/c.png"),),
        (("optical", "city/optical/d.jpg"), ("sar", "city/sar/d.png")),
        (("optical", "loose.png"),),
    }


def test_an_ambiguous_pair_is_refused_but_equal_stems_of_one_modality_are_not(tmp_path):
    touch(tmp_path, "optical/a.png", "optical/a.jpg")
    assert len(scan_modalities(tmp_path, ["optical", "sar"], "optical")) == 2
    touch(tmp_path, "sar/a.png")
    with pytest.raises(DataError, match=r"optical/a.jpg, optical/a.png"):
        scan_modalities(tmp_path, ["optical", "sar"], "optical")


def test_class_folders_give_labels(tmp_path):
    touch(tmp_path, "river/2.png", "beach/1.png", "river/sub/3.png")
    samples, names = scan_classes(tmp_path, "optical")
    assert names == ["beach", "river"]
    assert [(s.files[0][1], s.label) for s in samples] == [
        ("beach/1.png", 0),
        ("river/2.png", 1),
        ("river/sub/3.png", 1),
    ]


def test_images_outside_class_folders_and_a_single_class_are_errors(tmp_path):
    touch(tmp_path, "beach/1.png")
    with pytest.raises(DataError, match="one class only"):
        scan_classes(tmp_path, "optical")
    touch(tmp_path, "2.png")
    with pytest.raises(DataError, match=r"'2.png' lies in no class folder"):
        scan_classes(tmp_path, "optical")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_8_bit_image_becomes_uint8_of_the_wanted_channels(tmp_path, mode, channels):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (7, 5), (10, 200, 30)).convert(mode).save(path)
    image = decode(path, channels)
    assert image.shape == (channels, 5, 7)
    assert image.dtype == torch.uint8


def test_16_bit_and_float_images_keep_their_values(tmp_path):
    Image.fromarray(np.array([[0, 40_000]], dtype=np.uint16)).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[-1.5, 2.5]], dtype=np.float32)).save(tmp_path / "b.tif")
    assert decode(tmp_path / "a.tif", 1).tolist() == [[[0, 40_000]]]
    assert decode(tmp_path / "b.tif", 1).tolist() == [[[-1.5, 2.5]]]
    with pytest.raises(DataError, match="has 1 channel, the model expects 3"):
        decode(tmp_path / "a.tif", 3)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg", 3).shape == (3, 8, 4)


def test_unreadable_files_say_why(tmp_path):
    write_image(tmp_path / "whole.png", 0)
    content = (tmp_path / "whole.png").read_bytes()
    for name, data in {"empty.png": b"", "cut.png": content[: len(content) // 2], "text.png": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            decode(tmp_path / name, 3)


def test_bands_beyond_three_need_rasterio(monkeypatch):
    check_modalities({"optical": 3, "sar": 1})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"Modality 'msi' of 13 channels needs rasterio.*hf_rsheat\[geo\]"):
        check_modalities({"optical": 3, "msi": 13})
