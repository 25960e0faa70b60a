import json
from pathlib import Path

import pytest
import torch

from hf_rsheat.errors import CacheError, DataError
from hf_rsheat.training import teacher_cache
from hf_rsheat.training.image_folder import decode, image_paths
from hf_rsheat.training.teacher import Teacher, whole_view
from hf_rsheat.training.teacher_cache import TeacherCache, build_cache, cache_key

from .conftest import write_image
from .teachers import SIZE, save_sam


class CountingTeacher(Teacher):
    """A teacher that counts its images, and may be killed after some."""

    calls = 0
    limit: int | None = None

    def __call__(self, pixel_values):
        if self.calls == self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return super().__call__(pixel_values)


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    for index in range(5):
        write_image(folder / f"{index}.png", index, size=(48, 40 + 8 * index))
    return folder


@pytest.fixture
def teacher(tmp_path) -> CountingTeacher:
    return CountingTeacher(save_sam(tmp_path / "sam"))


def build(tmp_path, teacher, images, **options) -> dict[str, str]:
    options = {"shard_images": 2, **options}
    return build_cache(tmp_path / "cache", teacher, images, image_paths(images), SIZE, **options)


def open_cache(tmp_path, teacher, symmetries: bool = False) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", cache_key(teacher, SIZE, symmetries))


def read_all(cache: TeacherCache, images: Path) -> list[torch.Tensor]:
    return [cache.read(path, decode(images / path, 3), 0) for path in image_paths(images)]


@pytest.mark.parametrize("symmetries", [False, True])
def test_cached_maps_are_the_teachers_to_half_precision(tmp_path, teacher, images, symmetries):
    build(tmp_path, teacher, images, symmetries=symmetries)
    cache, prepare = open_cache(tmp_path, teacher, symmetries), teacher.input_for(SIZE)
    for path in image_paths(images):
        pixels = decode(images / path, 3)
        for view in range(8 if symmetries else 1):
            expected = teacher(prepare(whole_view(pixels, SIZE, view))[None])[0]
            torch.testing.assert_close(cache.read(path, pixels, view).float(), expected, atol=1e-3, rtol=1e-3)


def test_a_killed_build_continues_after_its_last_whole_shard(tmp_path, teacher, images):
    teacher.limit = 3
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, teacher, images)
    with pytest.raises(CacheError, match="3 of 5 images are not in"):
        open_cache(tmp_path, teacher).check_complete(image_paths(images))
    teacher.limit = None
    build(tmp_path, teacher, images)
    assert teacher.calls == 3 + 3  # the third image belonged to a shard that was not whole
    build(tmp_path, teacher, images)
    assert teacher.calls == 6
    assert len(read_all(open_cache(tmp_path, teacher), images)) == 5


def test_a_kill_between_shard_and_manifest_loses_nothing_else(tmp_path, teacher, images, monkeypatch):
    original = teacher_cache._replace

    def killed(path, write):
        original(path, write)
        if path.name == "maps-00001.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache, "_replace", killed)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, teacher, images)
    monkeypatch.setattr(teacher_cache, "_replace", original)
    build(tmp_path, teacher, images)
    assert len(read_all(open_cache(tmp_path, teacher), images)) == 5
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "manifest.json",
        *(f"maps-0000{index}.safetensors" for index in range(3)),
    }


def test_new_images_are_added_and_old_maps_kept(tmp_path, teacher, images):
    build(tmp_path, teacher, images)
    write_image(images / "new.png", 9)
    with pytest.raises(CacheError, match=r"1 of 6 images are not in.*'new\.png'"):
        open_cache(tmp_path, teacher).check_complete(image_paths(images))
    with pytest.raises(CacheError, match=r"'new\.png' is not in"):
        read_all(open_cache(tmp_path, teacher), images)
    build(tmp_path, teacher, images)
    assert teacher.calls == 6
    assert len(read_all(open_cache(tmp_path, teacher), images)) == 6


def test_unreadable_images_are_named_and_left_out(tmp_path, teacher, images):
    (images / "broken.png").write_bytes(b"not an image")
    assert list(build(tmp_path, teacher, images)) == ["broken.png"]
    open_cache(tmp_path, teacher).check_complete(image_paths(images))  # training will leave it out, too
    write_image(images / "broken.png", 7)
    assert build(tmp_path, teacher, images) == {}
    assert len(read_all(open_cache(tmp_path, teacher), images)) == 6


@pytest.mark.parametrize("position", [0.02, 0.5, 0.999])
def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path, teacher, images, position):
    build(tmp_path, teacher, images, shard_images=5)
    shard = tmp_path / "cache" / "maps-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[int(position * len(content))] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="damaged"):
        read_all(open_cache(tmp_path, teacher), images)


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest", "not json"])
def test_damaged_files_are_noticed_when_the_cache_is_opened(tmp_path, teacher, images, damage):
    build(tmp_path, teacher, images)
    folder = tmp_path / "cache"
    shard, manifest = folder / "maps-00001.safetensors", folder / "manifest.json"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        manifest.write_text("{}" if damage == "manifest" else manifest.read_text()[:-5])
    with pytest.raises(CacheError, match=r"damaged.*--overwrite"):
        open_cache(tmp_path, teacher)
    with pytest.raises(CacheError, match="damaged"):
        build(tmp_path, teacher, images)
    build(tmp_path, teacher, images, overwrite=True)
    assert len(read_all(open_cache(tmp_path, teacher), images)) == 5


def test_a_changed_image_is_noticed(tmp_path, teacher, images):
    build(tmp_path, teacher, images)
    write_image(images / "3.png", 33, size=(48, 64))
    with pytest.raises(CacheError, match=r"'3\.png' has changed"):
        read_all(open_cache(tmp_path, teacher), images)


def test_a_cache_of_another_teacher_or_another_input_is_stale(tmp_path, teacher, images):
    build(tmp_path, teacher, images)
    others = {
        "teacher": Teacher(save_sam(tmp_path / "other", seed=1)),
        "input": Teacher(save_sam(tmp_path / "statistics", image_mean=[0.5, 0.5, 0.5])),
        "precision": Teacher(tmp_path / "sam", "bfloat16"),
    }
    for name, other in others.items():
        with pytest.raises(CacheError, match=f"stale: '{name}'"):
            open_cache(tmp_path, other)
    with pytest.raises(CacheError, match="stale: 'views'"):
        open_cache(tmp_path, teacher, symmetries=True)
    with pytest.raises(CacheError, match="stale"):
        build(tmp_path, others["teacher"], images)
    build(tmp_path, others["teacher"], images, overwrite=True)
    assert open_cache(tmp_path, others["teacher"])


def test_an_absent_cache_says_how_to_make_it(tmp_path, teacher):
    with pytest.raises(CacheError, match="hf-rsheat distill cache"):
        open_cache(tmp_path, teacher)


def test_maps_beyond_half_precision_are_refused(tmp_path, teacher, images, monkeypatch):
    monkeypatch.setattr(Teacher, "__call__", lambda self, values: torch.full((len(values), 2, 4, 4), 1e6))
    with pytest.raises(DataError, match="float16"):
        build(tmp_path, Teacher(tmp_path / "sam"), images)


def test_the_manifest_names_no_folder_of_this_machine(tmp_path, teacher, images):
    build(tmp_path, teacher, images)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert str(tmp_path) not in json.dumps(manifest)
    assert [image["path"] for shard in manifest["shards"] for image in shard["images"]] == image_paths(images)
