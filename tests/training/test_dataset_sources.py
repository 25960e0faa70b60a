"""Data sets of the `datasets` library: prepared on the disk, or streamed from a local double of the Hub."""

import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_rsheat.errors import ConfigurationError, DataError, TransferError
from hf_rsheat.training.data import BatchReader, load_batches
from hf_rsheat.training.dataset_source import open_dataset
from hf_rsheat.training.image_folder import decode
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.planning import dry_run
from hf_rsheat.training.recipe import load_recipe
from hf_rsheat.training.sampler import GlobalBatchSampler, build_sampler

from .conftest import TINY_MODEL, read_log, write_image
from .dataset_hub import DatasetHub, patch_hub
from .processes import assert_same_run

SHARDS, ROWS = 12, 5
BOTH = ["optical", "sar"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 pairs, in folders."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(SHARDS * ROWS):
        write_image(folder / "optical" / f"{index:02}.png", index)
        write_image(folder / "sar" / f"{index:02}.png", 100 + index, "L")
    return folder


def rows(images: Path, numbers) -> datasets.Dataset:
    cells = {
        name: [{"bytes": (images / name / f"{i:02}.png").read_bytes(), "path": None} for i in numbers] for name in BOTH
    }
    features = {name: datasets.Image() for name in BOTH} | {"label": datasets.ClassLabel(names=["land", "sea"])}
    return datasets.Dataset.from_dict(
        {**cells, "label": [i % 2 for i in numbers]}, features=datasets.Features(features)
    )


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, images) -> Path:
    """The pairs as Parquet shards, as a data set on the Hub has them."""
    folder = tmp_path_factory.mktemp("parquet")
    (folder / "data").mkdir()
    for shard in range(SHARDS):
        table = rows(images, range(shard * ROWS, (shard + 1) * ROWS))
        table.to_parquet(folder / "data" / f"train-{shard:05}-of-{SHARDS:05}.parquet", batch_size=2)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory, images) -> Path:
    """The pairs as WebDataset tars: `07.optical.png` and `07.sar.png` are one sample."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:02}.tar", "w") as tar:
            for index in range(shard * ROWS, (shard + 1) * ROWS):
                for name in BOTH:
                    tar.add(images / name / f"{index:02}.png", f"{index:02}.{name}.png")
    return folder


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch, parquet, tars, images):
    with DatasetHub() as double:
        patch_hub(monkeypatch, double.url)
        double.add("me/parquet", parquet)
        double.add("me/tars", tars)
        double.add("me/images", images)
        double.add("me/private", parquet, private=True)
        yield double


def pixels(source, sample):
    return [decode(source.open(name), 1 if modality == "sar" else 3) for modality, name in sample.files]


def assert_the_pairs(source, images, scenes):
    assert len(scenes) == SHARDS * ROWS
    assert all([modality for modality, _ in sample.files] == BOTH for sample in scenes)
    for index in (0, 7, 29):
        expected = [
            decode(images / name / f"{index:02}.png", channels) for name, channels in (("optical", 3), ("sar", 1))
        ]
        assert all(map(torch.equal, pixels(source, scenes[index]), expected))


def test_a_prepared_table_and_a_saved_one_are_read_by_row(images, parquet, tmp_path):
    rows(images, range(SHARDS * ROWS)).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows(images, range(SHARDS * ROWS))).save_to_disk(tmp_path / "splits")
    for path in (parquet, tmp_path / "saved", tmp_path / "splits"):
        source = open_dataset({"path": str(path)})
        assert_the_pairs(source, images, source.scenes(BOTH, "optical"))
        samples, classes = open_dataset({"path": str(path), "image_column": "optical"}).classes("optical")
        assert classes == ["land", "sea"]
        assert [sample.label for sample in samples[:3]] == [0, 1, 0]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("me/parquet", {}),
        ("me/tars", {"image_column": {"optical": "optical.png", "sar": "sar.png"}}),
        ("me/images", {}),
    ],
)
def test_parquet_tars_and_images_are_streamed_from_the_hub(hub, images, path, extra):
    source = open_dataset({"path": path, "streaming": True, **extra})
    assert_the_pairs(source, images, source.scenes(BOTH, "optical"))
    sent = hub.sent
    again = open_dataset({"path": path, "streaming": True, **extra})
    assert len(again.scenes(BOTH, "optical")) == SHARDS * ROWS
    assert again.digest == source.digest
    assert hub.sent - sent < 100_000, "what shards hold is remembered, but for one footer"


def test_streamed_classes_come_from_a_column_or_from_folders(hub):
    samples, classes = open_dataset({"path": "me/parquet", "streaming": True, "image_column": "optical"}).classes(
        "optical"
    )
    assert (classes, [sample.label for sample in samples[:4]]) == (["land", "sea"], [0, 1, 0, 1])
    assert samples[-1].files == (("optical", f"data/train-{SHARDS - 1:05}-of-{SHARDS:05}.parquet/optical/{ROWS - 1}"),)
    samples, classes = open_dataset({"path": "me/images", "streaming": True}).classes("optical")
    assert classes == BOTH
    with pytest.raises(ConfigurationError, match="Classes of WebDataset tars cannot be streamed"):
        open_dataset({"path": "me/tars", "streaming": True}).classes("optical")


def streamed(make_recipe, output_dir, path="me/parquet", **changes):
    """One shard at a time and room for little more, so that shards come and go."""
    keys = changes.pop("keys", {})
    settings = {"path": path, "streaming": True, "mixed_shards": 1, "cache_gigabytes": 2.9e-4, **keys}
    values = {"image_folder": "", "dataset": settings, "output_dir": str(output_dir), "trackers": [], "max_steps": 12}
    return make_recipe(**{**values, "save_steps": 6, "max_skipped": 0.0, **changes})


def test_streaming_is_exact_through_interruptions_and_evictions(hub, make_recipe, tmp_path):
    recipe = streamed(make_recipe, tmp_path / "whole", max_steps=24)
    train(recipe)
    cache = tmp_path / "cache" / "hf_rsheat_shards"
    sizes = [path.stat().st_size for path in cache.glob("*.tar")]
    assert 0 < sum(sizes) <= 2.9e5
    assert len(sizes) < SHARDS
    fetched = hub.count(r"GET /datasets/me/parquet/resolve/.*parquet")
    assert fetched > 2 * SHARDS + 1, "footers, and shards that were deleted and needed again"
    recipe = streamed(make_recipe, tmp_path / "stopped", max_steps=24, num_workers=2)
    train(recipe)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-24")
    shutil.rmtree(tmp_path / "stopped" / "hub")
    shutil.rmtree(cache)
    train(recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert "Training data: me/parquet" in (tmp_path / "whole" / "hub" / "README.md").read_text()


def test_an_epoch_passes_over_the_shards_and_holds_every_sample_once():
    number, size, mixed = 40, 25, 6
    shards = np.repeat(np.arange(number), size)
    groups = np.where(np.arange(number * size) % 5 == 0, "pair", "single").tolist()
    sampler = GlobalBatchSampler(groups, 10, seed=0, shards=(shards, mixed))
    for epoch in range(2):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        batches = [sampler.global_batch(step)[2] for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(number * size))
        seen = [set(shards[batch].tolist()) for batch in batches]
        spans = [[i for i, batch in enumerate(seen) if shard in batch] for shard in range(number)]
        in_use = [sum(span[0] <= i <= span[-1] for span in spans) for i in range(len(seen))]
        assert max(in_use) <= mixed + 3
        assert min(in_use[5:-5]) >= mixed / 2
    first, second = (sampler.global_batch(i * sampler.steps_per_epoch)[2].tolist() for i in range(2))
    assert first != second


def test_data_sets_streamed_together_are_mixed_by_name(hub, make_recipe, tmp_path):
    for name in ("flood", "city"):
        hub.repos[f"me/{name}"] = hub.repos["me/parquet"]
    keys = {
        "path": "parquet",
        "data_files": {"train": [f"hf://datasets/me/{name}/data/*.parquet" for name in ("flood", "city")]},
        "cache_gigabytes": 1,
    }
    recipe = streamed(make_recipe, tmp_path / "run", keys=keys, mixture={"flood": 2.5, "city": 0.2})
    objective = get_objective("rs_vheat")(recipe)
    samples = objective.samples
    sampler = build_sampler(recipe, samples, objective.source.shards(samples))
    batches = [sampler.global_batch(step)[2] for step in range(sampler.steps_per_epoch)]
    used = [samples[index % len(samples)].files[0][1].split("/")[0] for index in np.concatenate(batches)]
    assert (used.count("flood"), used.count("city")) == (150, 12)


def test_a_row_that_cannot_be_used_is_skipped_and_named(images, make_recipe, tmp_path):
    table = rows(images, range(8)).to_dict()
    table["optical"][3] = {"bytes": b"no image", "path": None}
    table["sar"][5] = None
    features = rows(images, range(1)).features
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "table" / "train.parquet")
    for streaming in (False, True):
        folder = tmp_path / f"run{streaming}"
        keys = {"path": str(tmp_path / "table"), "streaming": streaming}
        train(streamed(make_recipe, folder, keys=keys, max_skipped=0.5))
        skipped = (folder / "skipped.jsonl").read_text().splitlines()
        prefix = "train.parquet/" if streaming else ""
        assert [line for name in ("optical/3", "sar/5") for line in skipped if f'"{prefix}{name}"' in line] == sorted(
            skipped, key=lambda line: "sar" in line
        )
        assert len(skipped) == 2


def test_passing_failures_are_waited_for_and_lasting_ones_end_the_run_without_a_skipped_image(
    hub, make_recipe, naps, tmp_path
):
    train(streamed(make_recipe, tmp_path / "whole"))
    shutil.rmtree(tmp_path / "cache" / "hf_rsheat_shards")
    hub.fail(r"GET /datasets/me/parquet/resolve/.*parquet", "cut")
    hub.fail(r"GET /datasets/me/parquet/resolve/.*parquet", status=503, times=2)
    recipe = streamed(make_recipe, tmp_path / "run", save_steps=2)
    # Shards that nothing has fetched when step 2 begins stay away.
    from hf_rsheat.training.step import Stepper

    take = Stepper.take

    def failing(self, step, *arguments):
        if step == 2:
            hub.fail("parquet", status=500, times=10_000)
        return take(self, step, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "take", failing)
        with pytest.raises(TransferError, match=r"Cannot fetch 'data/train-.*500.*--resume"):
            train(recipe)
    assert not (tmp_path / "run" / "skipped.jsonl").exists() or not (tmp_path / "run" / "skipped.jsonl").read_text()
    hub.faults.clear()
    train(recipe, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "me/none"}, "No data set 'me/none' that you may read.*HF_TOKEN"),
        ({"path": "me/private"}, "No data set 'me/private' that you may read"),
        ({"path": "me/parquet", "revision": "v9"}, "with a revision 'v9'"),
        ({"path": "me/parquet", "split": "tain"}, "split .?'?\"?tain"),
        ({"path": "me/parquet", "image_column": "label"}, "'label' holds ClassLabel.*no images"),
        ({"path": "me/parquet", "image_column": "opticl"}, "no column 'opticl', did you mean 'optical'"),
        ({"path": "me/parquet", "image_column": {"thermal": "optical"}}, "unknown modality 'thermal'"),
        ({"path": "me/parquet", "colum": "x"}, "Unknown dataset key 'colum'"),
        ({"path": "me/parquet", "mixed_shards": 0}, "must be at least 1"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_does_not_exist_or_fit_is_named(hub, settings, message, streaming):
    with pytest.raises((ConfigurationError, DataError), match=message):
        open_dataset({**settings, "streaming": streaming}).scenes(BOTH, "optical")


def test_a_cache_too_small_and_columns_that_leave_a_choice_are_refused(hub, naps, tmp_path):
    source = open_dataset({"path": "me/parquet", "streaming": True, "cache_gigabytes": 1e-6})
    samples = source.scenes(BOTH, "optical")
    with pytest.raises(
        ConfigurationError, match=r"Mixing 16 shards takes .* GB and there are 1e-06 GB: set dataset\.c"
    ):
        source.shards(samples)
    with pytest.raises(
        ConfigurationError, match=r"several columns of images \(optical, sar\): set dataset.image_column"
    ):
        open_dataset({"path": "me/parquet"}).scenes(["rgb"], "rgb")
    hub.fail("", status=500, times=10_000)
    with pytest.raises((TransferError, ConfigurationError, DataError)):
        open_dataset({"path": "me/parquet", "streaming": True})


def test_a_dry_run_reads_a_streamed_data_set_and_folders_alone_are_for_detectors(hub, make_recipe, tmp_path):
    plan = dry_run(streamed(make_recipe, tmp_path / "run"))
    assert "60 x optical+sar" in plan
    recipe = streamed(make_recipe, tmp_path / "run", objective="instances", objective_options={"dataset": "ssdd"})
    with pytest.raises(ConfigurationError, match="reads folders"):
        train(recipe)


def test_a_recipe_has_one_source_of_images():
    recipe = load_recipe(None, ["objective=mae", "output_dir=run", "dataset.path=me/scenes", "dataset.streaming=true"])
    assert (recipe.dataset, recipe.image_folder) == ({"path": "me/scenes", "streaming": True}, "")
    with pytest.raises(ConfigurationError, match="either 'image_folder' or 'dataset'"):
        load_recipe(None, ["objective=mae", "output_dir=run", "dataset.path=me/scenes", "image_folder=x"])
    with pytest.raises(ConfigurationError, match="remove it or 'dataset'"):
        load_recipe(None, ["objective=mae", "output_dir=run", "dataset.path=me/scenes", "manifest=x.csv"])


def test_a_classifier_learns_from_a_labelled_data_set(hub, make_recipe, tmp_path):
    for streaming in (False, True):
        recipe = streamed(
            make_recipe,
            tmp_path / f"run{streaming}",
            objective="classification",
            model={**TINY_MODEL, "modalities": {"optical": 3}},
            keys={"image_column": "optical", "streaming": streaming, "cache_gigabytes": 1},
        )
        train(recipe)
        assert all(np.isfinite(line["loss"]) for line in read_log(recipe.output_dir))


def test_image_bytes_of_local_tars_are_read_in_place(tars, images, tmp_path):
    source = open_dataset(
        {"path": str(tars), "streaming": True, "image_column": {"optical": "optical.png", "sar": "sar.png"}}
    )
    assert_the_pairs(source, images, source.scenes(BOTH, "optical"))
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert isinstance(source.open(source.scenes(BOTH, "optical")[0].files[0][1]), BytesIO)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_a_long_stream(make_recipe, tmp_path):
    """Resident memory after 20,000 samples is within 5 % of that after 1,000, while shards come and go."""
    import psutil

    folder = tmp_path / "shards"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(40):
        cells = []
        for _ in range(100):
            buffer = BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(folder / f"{shard:02}.parquet")
    room = 9 * max(path.stat().st_size for path in folder.iterdir()) / 1e9
    keys = {"path": str(folder), "mixed_shards": 4, "cache_gigabytes": room}
    recipe = streamed(make_recipe, tmp_path / "run", batch_size=50, keys=keys)
    objective = get_objective(recipe.objective)(recipe)
    sampler = build_sampler(recipe, objective.samples, objective.source.shards(objective.samples))
    plans = objective.source.read_ahead(sampler.plans(0, 400, 0, 1, 1), objective.samples, 1)
    memory: list[int] = []
    for number, loaded in enumerate(
        load_batches(BatchReader(objective.source, objective.samples, objective, 0), plans, 0, False), 1
    ):
        assert loaded.images == 50
        if number in (20, 400):
            memory.append(psutil.Process().memory_info().rss)
    change = memory[1] / memory[0] - 1
    print(f"\nresident memory: {memory[0] / 1e6:.0f} MB after 1,000 samples, {change:+.1%} after 20,000")
    assert memory[1] < 1.05 * memory[0]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= room * 1e9
