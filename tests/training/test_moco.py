"""Momentum contrast: what is a key, when the second encoder moves, and that nothing but the recipe decides a run."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel

from hf_rsheat import RS4DModel, RSVHeatModel, SelectiveMAEModel, VHeatModel
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.training.augmentation import Tone
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.loop import train
from hf_rsheat.training.momentum_contrast import MomentumContrast, info_nce, info_nce_in_batch, momentum_at
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.sampler import BatchPlan

from .conftest import TINY_MODEL, read_log, write_image
from .processes import Training

TOKENS = {"hidden_size": 16, "num_hidden_layers": 1}
FAMILIES = {
    "rs_vheat": (RSVHeatModel, {**TINY_MODEL}),
    "vheat": (VHeatModel, {**TINY_MODEL}),
    "selective_mae": (SelectiveMAEModel, {**TOKENS, "num_attention_heads": 2, "patch_size": 8}),
    "rs4d": (RS4DModel, {**TOKENS, "patch_size": 8}),
}
HEADS = {"head_size": 16, "key_size": 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(10):
        write_image(folder / f"{index}.png", index)
    return folder


@pytest.fixture
def recipe_of(make_recipe, pictures):
    def build(queue_size=6, model_type="selective_mae", **changes):
        fields = {
            "objective": "moco",
            "image_folder": str(pictures),
            "model": {"model_type": model_type, **FAMILIES[model_type][1]},
            "objective_options": {**HEADS, "queue_size": queue_size},
            "warmup_steps": 0,
        }
        return make_recipe(**{**fields, **changes})

    return build


BOTH = pytest.mark.parametrize("queue_size", [6, 0], ids=["queue", "in-batch"])


def read(objective, group="optical"):
    members = [i for i, sample in enumerate(objective.samples) if sample.group == group]
    reader = BatchReader(Path(objective.recipe.image_folder), objective.samples, objective, objective.recipe.seed)
    return reader[BatchPlan(0, 0, 0, 1, group, tuple(members[:4]))].batch


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_learns_and_exports_its_backbone(recipe_of, model_type):
    recipe = recipe_of(model_type=model_type, max_steps=2, save_steps=2)
    hub = train(recipe)
    assert type(AutoModel.from_pretrained(hub)) is FAMILIES[model_type][0]
    stored = load_file(Path(recipe.output_dir) / "checkpoint-2" / "model.safetensors")
    exported = load_file(hub / "model.safetensors")
    assert all(torch.equal(value, stored[f"encoder.{name}"]) for name, value in exported.items())
    assert stored["queue"].shape == (6, 8)


@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}, {"prune_ratio": 0.5}]
)
def test_options_of_every_run_work_here_too(recipe_of, changes):
    recipe = recipe_of(max_steps=8, save_steps=8, **changes)
    train(recipe)
    stored = load_file(Path(recipe.output_dir) / "checkpoint-8" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in stored.values())


def test_the_two_views_of_an_image_find_each_other(recipe_of):
    options = {**HEADS, "queue_size": 0, "crop_scale": (0.8, 1.0), "momentum": (0.9, 0.99)}
    fields = {"objective_options": options, "batch_size": 10, "max_steps": 50, "save_steps": 50}
    untrained, trained = (
        train(recipe_of(**fields, learning_rate=rate, output_dir=f"{recipe_of().output_dir}-{rate}")).parent
        for rate in (0.0, 3e-3)
    )
    before, after = (np.mean([line["accuracy"] for line in read_log(run)[-10:]]) for run in (untrained, trained))
    assert after > before + 0.15


@BOTH
def test_a_killed_run_continues_to_the_same_bits_with_its_keys(recipe_of, tmp_path, queue_size):
    model = {"model_type": "selective_mae", **FAMILIES["selective_mae"][1], "drop_path_rate": 0.3}
    changes = {"queue_size": queue_size, "model": model, "max_steps": 7, "save_steps": 3, "keep_checkpoints": None}
    whole = recipe_of(output_dir=str(tmp_path / "whole"), **changes)
    train(whole)
    shutil.copytree(whole.output_dir, tmp_path / "killed")
    for step in (6, 7):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{step}")
    train(recipe_of(output_dir=str(tmp_path / "killed"), num_workers=1, **changes), resume=True)
    first, second = (load_file(tmp_path / run / "checkpoint-7" / "model.safetensors") for run in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert any(name.startswith("momentum_encoder.") for name in first)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@BOTH
def test_two_processes_take_the_same_steps_as_one(recipe_of, tmp_path, queue_size):
    """Ten images in batches of three: the last batch leaves the second process without data."""
    changes = {"queue_size": queue_size, "batch_size": 3, "max_steps": 5, "save_steps": 5, "adam_epsilon": 1e-5}
    one = recipe_of(**changes)
    train(one)
    two = recipe_of(output_dir=str(tmp_path / "two"), **changes)
    training = Training(two, processes=2)
    assert training.finish() == [0, 0], training.text
    assert "2 process(es)" in training.text
    expected, found = read_log(one.output_dir), read_log(two.output_dir)
    assert [line["images"] for line in found] == [line["images"] for line in expected]
    assert 1 in [line["images"] for line in found]
    for before, after in zip(expected, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    first, second = (load_file(Path(run.output_dir) / "checkpoint-5" / "model.safetensors") for run in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=1e-5)


def test_the_second_encoder_follows_once_a_step_and_has_no_gradient(recipe_of):
    objective = get_objective("moco")(recipe_of(objective_options={**HEADS, "momentum": (0.5, 0.5)}, max_steps=4))
    model = objective.build_model().train()
    assert not model.momentum_encoder.training
    batch = read(objective)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        expected = [
            (old + new) / 2
            for part in ("encoder", "projector")
            for old, new in zip(
                getattr(model, f"momentum_{part}").parameters(), getattr(model, part).parameters(), strict=True
            )
        ]
        objective.loss(model, batch, step)["contrastive"][0].sum().backward()
        found = [*model.momentum_encoder.parameters(), *model.momentum_projector.parameters()]
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted)
            assert value.grad is None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_queue_holds_the_newest_keys_and_none_of_this_step(recipe_of):
    objective = get_objective("moco")(recipe_of(queue_size=6))
    model = objective.build_model().train()
    batch, old = read(objective), model.queue.clone()
    with torch.no_grad():
        _, keys = model(objective.inputs(batch), both=False)
        losses = objective.loss(model, batch, 0)["contrastive"][0]
        queries, _ = model(objective.inputs(batch), both=False)
    assert torch.equal(model.queue, torch.cat([old, keys[0]])[-6:])
    torch.testing.assert_close(losses, info_nce(queries[0], keys[0], old, 0.2)[0])


def test_info_nce_is_the_cross_entropy_of_the_own_key():
    queries, keys, others = (functional.normalize(torch.randn(n, 5), dim=-1) for n in (3, 3, 7))
    losses, nearest = info_nce(queries, keys, others, 0.5)
    for i in range(3):
        own = math.exp(queries[i] @ keys[i] / 0.5)
        rest = sum(math.exp(queries[i] @ other / 0.5) for other in others)
        assert losses[i].item() == pytest.approx(-math.log(own / (own + rest)), rel=1e-5)
        assert nearest[i].item() == (queries[i] @ keys[i] > (others @ queries[i]).max()).item()
    in_batch, hits = info_nce_in_batch(queries[1:], keys, 1, 0.5)
    for i in (1, 2):
        loss, hit = info_nce(queries[i : i + 1], keys[i : i + 1], keys[torch.arange(3) != i], 0.5)
        assert in_batch[i - 1].item() == pytest.approx(loss.item(), rel=1e-5)
        assert hits[i - 1] == hit[0]


def test_the_momentum_rises_along_half_a_cosine():
    assert [momentum_at(step, 100, 0.9, 1.0) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])


def test_a_pair_of_sensors_gives_one_view_each(make_recipe, scenes):
    recipe = make_recipe(objective="moco", objective_options=HEADS)
    objective = get_objective("moco")(recipe)
    batch = read(objective, "optical+sar")
    assert batch["modalities"] == ["optical", "sar"]
    assert batch["first"].shape[1:] == (3, 32, 32)
    assert batch["second"].shape[1:] == (1, 32, 32)
    losses = objective.loss(objective.build_model().train(), batch, 0)["contrastive"][0]
    assert losses.shape == (4,)
    losses.sum().backward()


def test_the_start_is_the_folder_named_and_the_heads_are_new(recipe_of, tmp_path):
    hub = train(recipe_of(max_steps=1, save_steps=1, output_dir=str(tmp_path / "first")))
    model = get_objective("moco")(recipe_of(model=str(hub))).build_model()
    assert isinstance(model, MomentumContrast)
    for name, value in load_file(hub / "model.safetensors").items():
        assert torch.equal(model.encoder.state_dict()[name], value)
        assert torch.equal(model.momentum_encoder.state_dict()[name], value)


def test_tones_follow_from_the_generator_and_strength_zero_changes_nothing():
    view = torch.randn(3, 4, 4)
    first, again = (Tone.draw(np.random.default_rng(1), 3, 0.4, 0.0).apply(view) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, view)
    assert torch.equal(Tone.draw(np.random.default_rng(1), 3, 0.0, 0.0).apply(view), view)
    grey = Tone.draw(np.random.default_rng(1), 3, 0.0, 1.0).apply(view)
    torch.testing.assert_close(grey[0], view.mean(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "cannot accumulate"),
        ({"objective_options": {"temperature": 0}}, "temperature"),
        ({"objective_options": {"momentum": [0.9, 1.5]}}, "momentum"),
        ({"model": {"model_type": "vit"}}, "Unknown model_type 'vit'"),
    ],
)
def test_wrong_entries_are_refused(recipe_of, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        train(recipe_of(**changes))
