from collections import Counter

import numpy as np
import pytest

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.training.image_folder import Sample
from hf_rsheat.training.recipe import Recipe
from hf_rsheat.training.sampler import GlobalBatchSampler, build_sampler

GROUPS = ["optical"] * 11 + ["optical+sar"] * 7 + ["sar"]


def test_every_sample_is_seen_once_an_epoch_in_batches_of_one_group():
    sampler = GlobalBatchSampler(GROUPS, batch_size=4, seed=3)
    assert sampler.steps_per_epoch == 3 + 2 + 1
    for epoch in range(2):
        seen = []
        for step in range(epoch * 6, epoch * 6 + 6):
            found, group, indices = sampler.global_batch(step)
            assert found == epoch
            assert {GROUPS[i] for i in indices} == {group}
            seen += indices.tolist()
        assert sorted(seen) == list(range(len(GROUPS)))


def test_the_order_is_a_pure_function_of_seed_and_step():
    first, second = (GlobalBatchSampler(GROUPS, 4, seed=3) for _ in range(2))
    steps = list(range(20))
    forward = [first.global_batch(step)[2].tolist() for step in steps]
    backward = [second.global_batch(step)[2].tolist() for step in reversed(steps)][::-1]
    assert forward == backward
    assert forward != [GlobalBatchSampler(GROUPS, 4, seed=4).global_batch(step)[2].tolist() for step in steps]
    assert forward[:6] != forward[6:12]


def test_the_order_does_not_change_between_releases():
    sampler = GlobalBatchSampler(["a"] * 6, batch_size=3, seed=0)
    assert [sampler.global_batch(step)[2].tolist() for step in range(2)] == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_processes_and_parts_share_a_global_batch_exactly(world_size, accumulation):
    sampler = GlobalBatchSampler(GROUPS, batch_size=4, seed=0)
    for step in range(sampler.steps_per_epoch):
        plans = [sampler.parts(step, rank, world_size, accumulation) for rank in range(world_size)]
        assert len({len(parts) for parts in plans}) == 1
        assert len({(plan.group, plan.parts) for parts in plans for plan in parts}) == 1
        shared = Counter(index for parts in plans for plan in parts for index in plan.indices)
        assert shared == Counter(sampler.global_batch(step)[2].tolist())
        for part in range(len(plans[0])):
            assert any(parts[part].indices for parts in plans), "a part without data anywhere wastes a forward pass"


def test_a_data_set_smaller_than_a_batch_gives_one_batch_an_epoch():
    sampler = GlobalBatchSampler(["optical"] * 3, batch_size=64, seed=0)
    assert sampler.steps_per_epoch == 1
    assert sorted(sampler.global_batch(5)[2].tolist()) == [0, 1, 2]


def recipe_with(mixture):
    return Recipe(objective="mae", image_folder="x", output_dir="y", batch_size=4, mixture=mixture)


def folder_samples():
    return [Sample((("optical", f"{name}/{i}.png"),)) for name in ("flood", "city") for i in range(10)]


def test_a_mixture_repeats_and_thins_out_folders_epoch_by_epoch():
    sampler = build_sampler(recipe_with({"flood": 2.5, "city": 0.3}), folder_samples())
    assert sampler.steps_per_epoch == 7  # 25 and 3 images
    epochs = []
    for epoch in range(40):
        steps = range(epoch * 7, epoch * 7 + 7)
        indices = np.concatenate([sampler.global_batch(step)[2] for step in steps])
        assert len(set(indices)) == len(indices) == 28  # copies have indices, and so random draws, of their own
        epochs.append(np.bincount(indices % 20, minlength=20))
    counts = np.array(epochs)
    assert set(counts[:, :10].ravel()) == {2, 3}
    assert set(counts[:, 10:].ravel()) == {0, 1}
    assert (counts[:, :10].sum(1) == 25).all()
    assert (counts.sum(0) > 0).all()  # which ones are drawn changes


def test_a_mixture_of_unknown_folders_or_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="names 'floods', where no image is: did you mean 'flood'"):
        build_sampler(recipe_with({"floods": 2}), folder_samples())
    with pytest.raises(ConfigurationError, match="leaves no image"):
        build_sampler(recipe_with({"flood": 0, "city": 0}), folder_samples())
