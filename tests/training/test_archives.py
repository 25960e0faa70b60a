import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat.errors import DataError
from hf_rsheat.training.image_folder import decode, image_paths, scan_modalities
from hf_rsheat.training.loop import train

from .conftest import TINY_MODEL, read_log, write_image


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """Five pairs and three optical images in folders."""
    folder = tmp_path_factory.mktemp("loose")
    for index in range(8):
        write_image(folder / "optical" / f"{index}.png", index)
        if index < 5:
            write_image(folder / "sar" / f"{index}.png", 100 + index, "L")
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, loose):
    """The same images in one tar, with a file that is no image."""
    folder = tmp_path_factory.mktemp("packed")
    (loose / "notes.json").write_text("{}")
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for path in sorted(loose.rglob("*.*")):
            tar.add(path, path.relative_to(loose).as_posix())
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory, loose):
    """The five pairs as rows of a Parquet file with a column per sensor; a sixth row has no SAR image."""
    import datasets

    folder = tmp_path_factory.mktemp("table")
    rows = {
        "optical": [{"bytes": (loose / "optical" / f"{i}.png").read_bytes(), "path": None} for i in range(6)],
        "sar": [{"bytes": (loose / "sar" / f"{i}.png").read_bytes(), "path": None} for i in range(5)] + [None],
        "place": ["somewhere"] * 6,
    }
    features = {"optical": datasets.Image(), "sar": datasets.Image(), "place": datasets.Value("string")}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / "pairs.parquet")
    return folder


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_tar_is_a_folder_of_images(loose, packed):
    expected = {path for path in image_paths(loose) if path.endswith(".png")}
    assert {path.removeprefix("shard-0.tar/") for path in image_paths(packed)} == expected
    for path in image_paths(packed):
        assert torch.equal(decode(packed / path, 3), decode(loose / path.removeprefix("shard-0.tar/"), 3))
    pairs = [sample for sample in scan_modalities(packed, ["optical", "sar"], "optical") if len(sample.files) == 2]
    assert len(pairs) == 5


def test_columns_of_a_parquet_file_are_folders_and_its_rows_pairs(loose, table):
    samples = scan_modalities(table, ["optical", "sar"], "optical")
    assert samples[2].files == (("optical", "pairs.parquet/optical/2"), ("sar", "pairs.parquet/sar/2"))
    assert len(samples) == 6
    assert torch.equal(decode(table / "pairs.parquet/optical/2", 3), decode(loose / "optical/2.png", 3))
    with pytest.raises(DataError, match=r"row 5 of .* has no image in 'sar'"):
        decode(table / "pairs.parquet/sar/5", 1)


def run(make_recipe, folder, name, **changes):
    settings = {"num_workers": 2, "max_steps": 8, "save_steps": 4, "trackers": [], "model": dict(TINY_MODEL)}
    recipe = make_recipe(image_folder=str(folder), output_dir=name, **{**settings, **changes})
    train(recipe)
    return [line["loss"] for line in read_log(name)]


def test_training_from_archives_is_training_from_folders_and_resumes_exactly(make_recipe, loose, packed, tmp_path):
    """A tar under the name of a folder is the same data set, so the losses are the same bits."""
    expected = run(make_recipe, loose, str(tmp_path / "loose"))
    assert run(make_recipe, packed, str(tmp_path / "packed")) == expected
    first = make_recipe(image_folder=str(packed), output_dir=str(tmp_path / "stopped"), max_steps=8, save_steps=4)
    import shutil

    train(first)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-8")
    train(first, resume=True)
    assert [line["loss"] for line in read_log(tmp_path / "stopped")] == expected


def test_training_from_parquet_leaves_out_what_is_missing(make_recipe, table, tmp_path):
    losses = run(make_recipe, table, str(tmp_path / "table"))
    assert all(np.isfinite(losses))
    skipped = (tmp_path / "table" / "skipped.jsonl").read_text()
    assert skipped.count("\n") == 1
    assert "pairs.parquet/sar/5" in skipped


def test_archives_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match=r"Cannot read '.*a\.tar'"):
        image_paths(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"Cannot read '.*a\.parquet'"):
        image_paths(tmp_path)


def test_a_compressed_tar_and_a_missing_member_are_errors(tmp_path):
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(buffer.getvalue())
        tar.addfile(info, BytesIO(buffer.getvalue()))
    with pytest.raises(DataError, match="Unpack compressed tars"):
        image_paths(tmp_path)
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        tar.addfile(info, BytesIO(buffer.getvalue()))
    assert decode(tmp_path / "c.tar/x.png", 3).shape == (3, 4, 4)
    with pytest.raises(DataError, match=r"has no 'y\.png'"):
        decode(Path(tmp_path) / "c.tar" / "y.png", 3)
