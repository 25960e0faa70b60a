"""Pruned epochs are shorter, unbiased, and a function of the recipe and the losses only."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.training.loop import train
from hf_rsheat.training.pruning import Pruning, draw_weights
from hf_rsheat.training.sampler import GlobalBatchSampler

from .conftest import read_log
from .processes import Training
from .test_loop import gradients_of_first_step

MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "norm_pix_loss": False,
}
ALONE = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, _: tensor)
SAMPLES = 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve images that are easy to reconstruct, four that are not, and one that is no image."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(16):
        rng = np.random.default_rng(index)
        easy = np.broadcast_to(120 + index + np.arange(40)[:, None, None] // 10, (40, 40, 3))
        pixels = rng.integers(0, 256, (40, 40, 3)) if index % 4 == 0 else easy
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture
def recipe_of(make_recipe, pictures):
    def build(**changes):
        fields = {
            "objective": "selective_mae",
            "image_folder": str(pictures),
            "model": dict(MODEL),
            "max_steps": 24,
            "save_steps": 7,
            "keep_checkpoints": None,
            "prune_ratio": 0.5,
            "warmup_steps": 0,
        }
        return make_recipe(**{**fields, **changes})

    return build


def make_pruning(make_recipe, **changes):
    recipe = make_recipe(**{"prune_ratio": 0.5, "max_steps": 1000, "warmup_steps": 0, **changes})
    sampler = GlobalBatchSampler(["a"] * SAMPLES, recipe.batch_size, recipe.seed)
    return sampler, Pruning(sampler, SAMPLES, recipe)


def see(sampler, pruning, first, last):
    """Take steps whose losses are the sample numbers; returns the samples of each step."""
    steps = [sampler.global_batch(step)[2].tolist() for step in range(first, last)]
    for indices in steps:
        pruning.record(indices, torch.tensor(indices, dtype=torch.float32))
    pruning.gather(ALONE)
    return steps


def test_the_expected_weight_of_every_sample_is_one():
    scores = np.arange(11, dtype=np.float32)  # five of them below the mean, two of which are left out
    draws = np.stack([draw_weights(scores, 0.5, np.random.default_rng(seed)) for seed in range(4000)])
    assert set(np.unique(draws[:, :5])) == {0, np.float32(5 / 3)}
    assert (draws[:, 5:] == 1).all()
    assert draws.sum(1) == pytest.approx(11)
    assert (draws == 0).sum(1).tolist() == [2] * 4000
    np.testing.assert_allclose(draws.mean(0), 1, atol=0.07)


@pytest.mark.parametrize("scores", [np.full(8, np.nan), np.full(8, 3.0), np.zeros(0)])
def test_nothing_is_left_out_without_a_difference(scores):
    assert (draw_weights(scores.astype(np.float32), 0.9, np.random.default_rng(0)) == 1).all()


def test_a_sample_that_was_never_seen_stays():
    scores = np.array([0, 0, 0, np.nan, 9], np.float32)
    for seed in range(20):
        assert draw_weights(scores, 0.99, np.random.default_rng(seed))[3] == 1


def test_epochs_after_the_first_are_shorter_and_the_end_is_whole(make_recipe):
    sampler, pruning = make_pruning(make_recipe, max_steps=101, prune_until=0.5)
    lengths, weights, step = [], [], 0
    while step < 101:
        last = pruning.plan(step)
        seen = Counter(index for batch in see(sampler, pruning, step, last) for index in batch)
        assert set(seen.values()) == {1}
        assert sorted(seen) == np.flatnonzero(pruning.weights).tolist()
        lengths.append((step, last))
        weights.append(pruning.weights)
        step = last
    pruned = [last - first < 10 for first, last in lengths]
    assert not pruned[0]
    assert sum(pruned) == 5
    assert all(last <= 50 for (_, last), short in zip(lengths, pruned, strict=True) if short)
    assert all(last - first in (8, 10) for first, last in lengths)
    for weight, short in zip(weights, pruned, strict=True):  # no weight outlives its epoch, and none the pruning
        assert weight.sum() == SAMPLES
        assert (weight == 1).all() != short


def test_asking_twice_within_an_epoch_draws_nothing_new(make_recipe):
    sampler, pruning = make_pruning(make_recipe)
    see(sampler, pruning, 0, pruning.plan(0))
    last = pruning.plan(10)
    first = [sampler.global_batch(step)[2].tolist() for step in range(10, last)]
    see(sampler, pruning, 10, 13)
    for step in (11, 12, last - 1):
        assert pruning.plan(step) == last
    assert [sampler.global_batch(step)[2].tolist() for step in range(10, last)] == first


def test_other_batches_go_on_in_the_epoch_that_follows(make_recipe):
    sampler, pruning = make_pruning(make_recipe)
    see(sampler, pruning, 0, pruning.plan(0))
    last = pruning.plan(10)
    state = {name: value.clone() for name, value in pruning.state().items()}
    larger, resumed = make_pruning(make_recipe, batch_size=8)
    resumed.load_state(state)
    assert larger.locate(last - 1) == (2, 0)  # twice the batch: the epoch has ended already
    assert resumed.plan(last - 1) > last - 1


LASTING = ("step", "loss", "epoch", "images", "grad_norm")


def lasting(output_dir):
    return [{name: line[name] for name in LASTING} for line in read_log(output_dir)]


def assert_equal_runs(first, second):
    assert lasting(first) == lasting(second)
    expected, found = (load_file(Path(run) / "hub" / "model.safetensors") for run in (first, second))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_run_prunes_resumes_anywhere_to_the_bit_and_workers_change_nothing(recipe_of, tmp_path):
    whole = recipe_of(output_dir=str(tmp_path / "whole"), save_steps=3)
    train(whole)
    images = Counter()
    for line in read_log(whole.output_dir):
        images[line["epoch"]] += line["images"]
    assert images[0] == 16
    assert min(images[epoch] for epoch in range(1, 4)) < 14
    for step in (3, 9):  # in the middle of a whole epoch, and of a pruned one
        output_dir = tmp_path / f"from-{step}"
        shutil.copytree(whole.output_dir, output_dir)
        for later in range(step + 3, 25, 3):
            shutil.rmtree(output_dir / f"checkpoint-{later}")
        train(recipe_of(output_dir=str(output_dir), save_steps=5, num_workers=step // 6), resume=True)
        assert_equal_runs(whole.output_dir, output_dir)


def test_the_checkpoint_holds_the_scores_as_safetensors(recipe_of):
    recipe = recipe_of(max_steps=10, save_steps=10)
    train(recipe)
    state = load_file(Path(recipe.output_dir) / "checkpoint-10" / "run_state.safetensors")
    assert sorted(state) == ["pruning.scores", "pruning.start", "pruning.weights"]
    assert state["pruning.scores"].isnan().tolist() == [False] * 16 + [True]  # the unreadable file
    manifest = json.loads((Path(recipe.output_dir) / "checkpoint-10" / "manifest.json").read_text())
    assert "run_state.safetensors" in manifest


def test_every_image_counts_in_the_gradient_as_its_weight_says(recipe_of, monkeypatch, tmp_path):
    def gradients(weights):
        monkeypatch.setattr(Pruning, "weights_of", lambda self, indices, device: torch.tensor(weights))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return gradients_of_first_step(recipe_of(max_steps=1, max_grad_norm=0))

    whole = gradients([3.0, 0.0, 1.0, 1.0])
    first, others = gradients([1.0, 0.0, 0.0, 0.0]), gradients([0.0, 0.0, 1.0, 1.0])
    for total, one, rest in zip(whole, first, others, strict=True):
        if total is not None:
            torch.testing.assert_close(total, 3 * one + rest, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["mae", "classification"])
def test_other_objectives_prune_too(recipe_of, classes, name):
    changes = {"model": {**MODEL, "intermediate_size": 32, "decoder_intermediate_size": 32}}
    if name == "classification":
        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size")
        model = {"model_type": "selective_mae", **{field: MODEL[field] for field in fields}}
        changes = {"image_folder": str(classes), "model": model}
    recipe = recipe_of(objective=name, **changes)
    train(recipe)
    images = Counter()
    for line in read_log(recipe.output_dir):
        images[line["epoch"]] += line["images"]
    assert images[0] == 16 > images[1]


def test_a_changed_image_folder_begins_a_new_epoch_of_all_images(recipe_of, pictures, tmp_path, caplog):
    train(recipe_of(max_steps=9))
    shutil.copytree(pictures, tmp_path / "more")
    shutil.copy(pictures / "00.png", tmp_path / "more" / "new.png")
    train(recipe_of(image_folder=str(tmp_path / "more"), max_steps=16), resume=tmp_path / "run" / "checkpoint-9")
    epoch = [line["images"] for line in read_log(tmp_path / "run")][9:14]
    assert sum(epoch) == 17
    assert "have changed" in caplog.text


def test_an_objective_without_a_loss_per_image_is_refused(make_recipe):
    with pytest.raises(ConfigurationError, match="no loss per image"):
        train(make_recipe(prune_ratio=0.5))


def test_pruning_is_not_switched_in_the_middle_of_a_run(recipe_of):
    train(recipe_of(max_steps=7))
    with pytest.raises(ConfigurationError, match=r"'prune_ratio' was 0\.5"):
        train(recipe_of(max_steps=9, prune_ratio=0.0), resume=True)


def test_two_processes_prune_the_same_images_as_one(recipe_of, tmp_path):
    one = recipe_of()
    train(one)
    two = recipe_of(output_dir=str(tmp_path / "two"))
    training = Training(two, processes=2)
    assert training.finish() == [0, 0], training.text
    assert "2 process(es)" in training.text
    expected, found = read_log(one.output_dir), read_log(two.output_dir)
    assert [(line["epoch"], line["images"]) for line in found] == [(line["epoch"], line["images"]) for line in expected]
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    first, second = (Path(run.output_dir) / "checkpoint-21" for run in (one, two))
    plans = [load_file(folder / "run_state.safetensors")["pruning.weights"] for folder in (first, second)]
    assert torch.equal(*plans)
    found_weights = load_file(second / "model.safetensors")
    for name, value in load_file(first / "model.safetensors").items():
        # The bias of the keys shifts all scores of a query alike: its gradient is 0 but for rounding, which Adam scales
        # up to a step of full size. Nothing else may differ.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(found_weights[name], value, atol=2e-5, rtol=1e-4)
