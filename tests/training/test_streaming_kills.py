"""A streamed run that is killed, or continued by another number of processes, sees what it would have seen."""

import random
from functools import partial

import datasets
import pytest

from hf_rsheat.training.journal import read_lines

from .conftest import TINY_MODEL
from .processes import Training, assert_same_run, tiny
from .test_kills import SAVE_STEPS, _read_notes, _stop_after, note_samples, run_to_the_end_under_fire


@pytest.fixture(scope="module")
def shards(tmp_path_factory, scenes):
    """Six Parquet shards of five images; streaming copies shards of any place."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted((scenes / "optical").glob("scene*.png"))
    for shard in range(6):
        cells = [{"bytes": files[(5 * shard + i) % len(files)].read_bytes(), "path": None} for i in range(5)]
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": cells}, features=features)
        table.to_parquet(folder / f"train-{shard}-of-6.parquet")
    return folder


def streamed(shards, output_dir, cache, **changes):
    """A tiny recipe with room for about half of the shards."""
    dataset = {"path": str(shards), "streaming": True, "mixed_shards": 1, "cache_folder": str(cache)}
    room = 4 * max(path.stat().st_size for path in shards.iterdir()) / 1e9
    return tiny("", output_dir, dataset={**dataset, "cache_gigabytes": room}, **changes)


def test_the_number_of_processes_may_change_while_streaming(shards, tmp_path):
    """1, 2 and 1 processes: the same samples in every step, each once an epoch, and the same losses to 1e-6."""
    model = {**TINY_MODEL, "drop_path_rate": 0.0}
    make = partial(streamed, shards, cache=tmp_path / "cache", model=model, max_steps=9, save_steps=3)
    alone = make(tmp_path / "alone")
    assert Training(alone, prepare=partial(note_samples, str(tmp_path / "alone.txt"))).finish() == [0]
    for processes, until in ((1, 3), (2, 6), (1, 9)):
        stop = partial(_stop_after, until, str(tmp_path / "changing.txt"))
        status = 0 if until == 9 else 143
        changing = make(tmp_path / "changing")
        assert Training(changing, True, processes, prepare=stop).finish() == [status] * processes
    expected, found = (_read_notes(tmp_path / f"{name}.txt") for name in ("alone", "changing"))
    assert found == expected
    first_epoch = [index for (_, epoch), indices in found.items() if epoch == 0 for index in indices]
    assert sorted(first_epoch) == list(range(30))
    pairs = zip(read_lines(tmp_path / "alone/log.jsonl"), read_lines(tmp_path / "changing/log.jsonl"), strict=True)
    for before, after in pairs:
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 10)])
def test_kills_cost_a_streamed_run_no_bit(shards, tmp_path, processes, kills):
    undisturbed = streamed(shards, tmp_path / "undisturbed", tmp_path / "cache", save_steps=SAVE_STEPS)
    assert Training(undisturbed, processes=processes).finish() == [0] * processes
    total = runs = 0
    while total < kills:
        recipe = streamed(shards, tmp_path / f"run{runs}", tmp_path / f"cache{runs}", save_steps=SAVE_STEPS)
        rng = random.Random(runs)
        total += run_to_the_end_under_fire(recipe, rng, min(5, kills - total), processes)[0]
        assert_same_run(tmp_path / "undisturbed", recipe.output_dir)
        runs += 1
    print(f"\n{total} kills of {processes} process(es) in {runs} streamed runs: all resumed, equal bits")
