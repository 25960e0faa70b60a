"""1,000 files of which 100 are broken, in 20 ways."""

import json
import os
import struct
import tempfile
import traceback
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat.errors import DataError
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.image_folder import check_content, decode, image_paths
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.sampler import BatchPlan

from .conftest import TINY_MODEL, read_log, write_image


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width, height, depth=8, colour=2):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 64)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def encoded(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(mode="RGB", seed=0):
    """A smooth random image, which JPEG keeps well."""
    shape = (4, 4, {"L": 1, "RGB": 3, "CMYK": 4}[mode])
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8).squeeze()
    return Image.fromarray(coarse, mode).resize((40, 40), Image.Resampling.BICUBIC)


def tiff_without_bands():
    """A TIFF directory that names no strips and zero samples per pixel."""
    entries = [(256, 4, 1, 40), (257, 4, 1, 40), (277, 3, 1, 0)]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)


def as_file(data):
    return lambda path: path.write_bytes(data)


JPEG, PNG = encoded(scene(), "JPEG"), encoded(scene(), "PNG")
FLOATS = np.random.default_rng(0).random((40, 40), dtype=np.float32)
BROKEN = {
    "empty": as_file(b""),
    "cut_jpeg": as_file(JPEG[: len(JPEG) // 2]),
    "cut_png": as_file(PNG[: len(PNG) // 2]),
    "header_only": as_file(JPEG[:20]),
    "text": as_file(b"<html>404</html>"),
    "zeros": as_file(bytes(5000)),
    "wrong_checksum": as_file(PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:]),
    "bomb": as_file(png_of_size(40_000, 40_000)),
    "no_width": as_file(png_of_size(0, 40)),
    "impossible_depth": as_file(png_of_size(40, 40, depth=3)),
    "no_bands": as_file(tiff_without_bands()),
    "nan": lambda path: Image.fromarray(np.where(FLOATS < 0.5, np.nan, FLOATS)).save(path, "TIFF"),
    "infinite": lambda path: Image.fromarray(np.where(FLOATS < 0.5, np.inf, FLOATS)).save(path, "TIFF"),
    "float_for_rgb": lambda path: Image.fromarray(FLOATS).save(path, "TIFF"),
    "sixteen_bit_for_rgb": lambda path: Image.fromarray((FLOATS * 60_000).astype(np.uint16)).save(path, "TIFF"),
    "nodata": lambda path: Image.new("RGB", (40, 40)).save(path, "PNG"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling_link": lambda path: path.symlink_to("nowhere.png"),
    "pipe": lambda path: os.mkfifo(path),
    "cut_tiff": as_file(encoded(scene(), "TIFF")[:200]),
}


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene().save(path, "JPEG", exif=exif)


USABLE = {
    "wrong_extension": as_file(JPEG),
    "cmyk": as_file(encoded(scene("CMYK"), "TIFF")),
    "palette": lambda path: scene().quantize(256).save(path, "PNG"),
    "grey": lambda path: scene("L").save(path, "PNG"),
    "alpha": lambda path: scene().convert("RGBA").save(path, "PNG"),
    "rotated": rotated,
    "animated": lambda path: scene().save(path, "GIF", save_all=True, append_images=[scene(seed=1), scene(seed=2)]),
    "progressive": as_file(encoded(scene(), "JPEG", progressive=True)),
}


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "nodata"])
def test_a_broken_file_is_an_error_that_gives_the_reason(tmp_path, name):
    BROKEN[name](tmp_path / "x.png")
    with pytest.raises(DataError, match=r"cannot be read: .+|has 1 channel|not finite") as raised:
        decode(tmp_path / "x.png", 3)
    assert str(tmp_path) not in str(raised.value)


def test_an_image_of_nothing_but_nodata_has_no_content(tmp_path):
    BROKEN["nodata"](tmp_path / "x.png")
    with pytest.raises(DataError, match="has no content"):
        check_content(decode(tmp_path / "x.png", 3))
    check_content(torch.tensor([[[0, 0]], [[0, 1]]]))


@pytest.mark.parametrize("name", USABLE)
def test_an_odd_but_sound_file_is_used_correctly(tmp_path, name):
    USABLE[name](tmp_path / "x.png")
    image = decode(tmp_path / "x.png", 3)
    assert image.shape == (3, 40, 40)
    if name in ("cmyk", "grey"):
        return
    expected = np.asarray(scene()).astype(int)
    if name == "rotated":
        expected = np.rot90(expected, -1)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).mean()
    assert difference < 10  # turned the wrong way, it would be 50


def as_nobody(function):
    """What a function returns in a process that may not read everything, even if this one may."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, json.dumps(function()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


@pytest.fixture
def shared_folder():
    """One that everybody may enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_images_without_permission_are_left_out_with_the_reason(make_recipe, shared_folder):
    for name in ("free/a.png", "free/secret.png", "closed/b.png"):
        write_image(shared_folder / name, 0)
    (shared_folder / "free" / "secret.png").chmod(0)
    (shared_folder / "closed").chmod(0o444)  # its files are listed, but cannot be opened
    model = {**TINY_MODEL, "modalities": {"optical": 3}}
    objective = get_objective("rs_vheat")(make_recipe(image_folder=str(shared_folder), model=model))

    def read():
        loaded = BatchReader(shared_folder, objective.samples, objective, 0)[
            BatchPlan(0, 0, 0, 1, "optical", (0, 1, 2))
        ]
        return loaded.images, loaded.skipped

    reason = "cannot be read: {}Permission denied"
    assert as_nobody(read) == [
        1,
        [["closed/b.png", reason.format("")], ["free/secret.png", reason.format("[Errno 13] ")]],
    ]


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_a_smaller_data_set(shared_folder):
    for name in ("free/a.png", "closed/b.png"):
        write_image(shared_folder / name, 0)
    (shared_folder / "closed").chmod(0)

    def scan():
        with pytest.raises(DataError, match=r"Cannot list '.*closed': Permission denied\. Allow it"):
            image_paths(shared_folder)
        return True

    assert as_nobody(scan)


def make_folder(folder, total, broken):
    """A folder with `broken` unusable files among `total`; returns their relative paths."""
    kinds = list(BROKEN)
    unusable = []
    odd = list(USABLE)
    for index in range(total):
        path = folder / f"part{index % 7}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if index % (total // broken) == 3:
            BROKEN[kinds[len(unusable) % len(kinds)]](path)
            unusable.append(path.relative_to(folder).as_posix())
        elif index % 10 == 5:
            USABLE[odd[index // 10 % len(odd)]](path)
        else:
            write_image(path, index, size=(40, 40))
    return unusable


def run_over(make_recipe, folder, name, total, workers):
    model = {**TINY_MODEL, "modalities": {"optical": 3}}
    recipe = make_recipe(
        image_folder=str(folder),
        output_dir=str(folder.parent / name),
        model=model,
        batch_size=50,
        max_steps=total // 50,
        save_steps=total // 50,
        num_workers=workers,
        trackers=[],
        warmup_steps=0,
    )
    train(recipe)
    skipped = [json.loads(line) for line in (Path(recipe.output_dir) / "skipped.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in read_log(recipe.output_dir)]
    return skipped, losses, sum(line["images"] for line in read_log(recipe.output_dir))


@pytest.mark.parametrize(("total", "broken"), [(200, 20), pytest.param(1000, 100, marks=pytest.mark.slow)])
def test_exactly_the_broken_files_are_left_out_whatever_the_worker_count(make_recipe, tmp_path, total, broken):
    unusable = make_folder(tmp_path / "images", total, broken)
    assert len(unusable) == broken
    results = [run_over(make_recipe, tmp_path / "images", f"run{workers}", total, workers) for workers in (0, 2)]
    assert results[0] == results[1]
    skipped, _, images = results[0]
    assert sorted(line["path"] for line in skipped) == sorted(unusable)
    assert all(line["reason"] for line in skipped)
    assert images == total - broken


def test_a_run_with_too_many_broken_images_stops_with_a_summary(make_recipe, tmp_path):
    make_folder(tmp_path / "images", 40, 10)
    model = {**TINY_MODEL, "modalities": {"optical": 3}}
    recipe = make_recipe(image_folder=str(tmp_path / "images"), model=model, max_skipped=0.1, max_steps=20)
    with pytest.raises(
        DataError, match=r"[5-8] of 40 images cannot be used, more than max_skipped: 0\.1 allows \(.+ x "
    ):
        train(recipe)
