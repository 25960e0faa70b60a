"""RS4D learns a teacher's maps in the one loop; its results depend on nothing but the recipe."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_rsheat import RS4DBackbone, RS4DForDistillation, RS4DModel
from hf_rsheat.errors import CacheError, ConfigurationError
from hf_rsheat.train import main
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.objectives.rs4d_distill import cache_for_recipe
from hf_rsheat.training.recipe import Recipe
from hf_rsheat.training.sampler import BatchPlan

from .conftest import read_log, write_image
from .processes import Training
from .teachers import CHANNELS, SIZE, save_sam, save_sam2

STUDENT = {"hidden_size": CHANNELS, "inner_size": 32, "num_hidden_layers": 2, "state_size": 4}
TERMS = ("l1", "l1_times_tokens", "noise_ratio", "mask_ratio")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        write_image(folder / f"{index}.png", index, size=(48, 40 + 4 * index))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_sam(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def recipe_of(make_recipe, images, teacher):
    def build(changes: dict | None = None, **options) -> Recipe:
        fields = {"image_folder": str(images), "image_size": SIZE, "model": dict(STUDENT), "warmup_steps": 0}
        options = {"teacher": str(teacher), **options}
        return make_recipe(objective="rs4d_distill", objective_options=options, **{**fields, **(changes or {})})

    return build


def read(objective, indices=range(6), epoch: int = 0):
    plan = BatchPlan(0, epoch, 0, 1, "optical", tuple(indices))
    return BatchReader(Path(objective.recipe.image_folder), objective.samples, objective, objective.recipe.seed)[plan]


def lasting(recipe: Recipe) -> list[dict]:
    return [{name: line[name] for name in ("step", "loss", "images", *TERMS)} for line in read_log(recipe.output_dir)]


def assert_equal_runs(first: Recipe, second: Recipe) -> None:
    assert lasting(first) == lasting(second)
    before, after = (load_file(Path(recipe.output_dir) / "hub" / "model.safetensors") for recipe in (first, second))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_loss_falls_and_the_folder_holds_the_plain_backbone(recipe_of):
    recipe = recipe_of({"max_steps": 60, "save_steps": 60, "learning_rate": 5e-3, "batch_size": 6})
    hub = train(recipe)
    losses = [line["loss"] for line in read_log(recipe.output_dir)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    student = AutoModel.from_pretrained(hub)
    assert type(student) is RS4DModel
    assert RS4DBackbone.from_pretrained(hub)(torch.randn(1, 3, 64, 64)).feature_maps[-1].shape == (1, CHANNELS, 4, 4)
    trained = RS4DForDistillation.from_pretrained(Path(recipe.output_dir) / "checkpoint-60")
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in trained.rs4d.state_dict().items())


def test_the_log_gives_the_loss_as_the_published_logs_do(recipe_of):
    recipe = recipe_of({"max_steps": 2}, noise_ratio=0.1, mask_ratio=0.3)
    train(recipe)
    for line in read_log(recipe.output_dir):
        assert line["loss"] == line["l1"]
        assert line["l1_times_tokens"] == pytest.approx(16 * line["l1"], rel=1e-6)
        assert line["noise_ratio"] == pytest.approx(0.1)
        assert line["mask_ratio"] == pytest.approx(0.3)


def test_linear_ratios_reach_their_end_at_the_last_step(recipe_of):
    recipe = recipe_of(schedule="linear", strength_range=[0.0, 2.0])
    train(recipe)
    ratios = [line["mask_ratio"] for line in read_log(recipe.output_dir)]
    assert ratios == pytest.approx([0.0, 0.08, 0.16, 0.24, 0.32, 0.4], abs=1e-6)


def test_an_adaptive_run_that_was_killed_continues_to_the_same_bits(recipe_of, tmp_path):
    options = {"schedule": "adaptive", "adaptive_window": 2}
    changes = {"max_steps": 10, "save_steps": 3, "learning_rate": 5e-3, "keep_checkpoints": None}
    whole = recipe_of({**changes, "output_dir": str(tmp_path / "whole")}, **options)
    train(whole)
    assert len({line["mask_ratio"] for line in read_log(whole.output_dir)}) > 2
    shutil.copytree(whole.output_dir, tmp_path / "killed")
    for name in ("checkpoint-6", "checkpoint-9", "checkpoint-10", "hub"):
        shutil.rmtree(tmp_path / "killed" / name)
    state = json.loads((tmp_path / "killed" / "checkpoint-3" / "trainer_state.json").read_text())["objective"]
    assert state["steps"] == 1  # in the middle of a window
    killed = recipe_of({**changes, "output_dir": str(tmp_path / "killed"), "num_workers": 2}, **options)
    train(killed, resume=True)
    assert_equal_runs(whole, killed)


def test_two_processes_raise_and_lower_the_ratios_as_one_does(recipe_of, tmp_path):
    options = {"schedule": "adaptive", "adaptive_window": 2}
    changes = {"batch_size": 5, "max_steps": 8, "learning_rate": 5e-3, "trackers": []}  # 6 images: then a batch of one
    one = recipe_of({**changes, "output_dir": str(tmp_path / "one")}, **options)
    train(one)
    two = recipe_of({**changes, "output_dir": str(tmp_path / "two")}, **options)
    training = Training(two, processes=2)
    assert training.finish() == [0, 0], training.text[-2000:]
    for before, after in zip(lasting(one), lasting(two), strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    assert 1 in [line["images"] for line in lasting(two)]


def test_every_sample_has_draws_of_its_own(recipe_of):
    objective = get_objective("rs4d_distill")(recipe_of())
    together, alone = read(objective).batch, read(objective, [4]).batch
    for name in ("pixel_values", "noise", "mask_order"):
        assert torch.equal(together[name][4:5], alone[name])
        assert name == "pixel_values" or not torch.equal(together[name][0], together[name][1])
    assert sorted(together["mask_order"][0].tolist()) == list(range(16))
    assert not torch.equal(read(objective, epoch=1).batch["noise"], together["noise"])


@pytest.mark.parametrize("symmetries", [False, True])
def test_cached_maps_train_the_same_student(recipe_of, tmp_path, symmetries):
    changes = {"max_steps": 4, "output_dir": str(tmp_path / "live")}
    live = recipe_of(changes, symmetries=symmetries)
    train(live)
    cached = recipe_of(
        {**changes, "output_dir": str(tmp_path / "cached"), "num_workers": 2},
        symmetries=symmetries,
        teacher_cache=str(tmp_path / "cache"),
    )
    with pytest.raises(CacheError, match="distill cache"):
        train(cached)
    assert cache_for_recipe(cached) == {}
    shutil.rmtree(Path(cached.output_dir), ignore_errors=True)
    train(cached)
    for before, after in zip(lasting(live), lasting(cached), strict=True):
        assert after == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stale_map_ends_the_run_with_one_sentence(recipe_of, images, tmp_path, num_workers, capsys):
    shutil.copytree(images, tmp_path / "images")
    changes = {"image_folder": str(tmp_path / "images"), "num_workers": num_workers}
    recipe = recipe_of(changes, teacher_cache=str(tmp_path / "cache"))
    cache_for_recipe(recipe)
    write_image(tmp_path / "images" / "3.png", 99)
    recipe.save(tmp_path / "recipe.yaml")
    assert main(["--config", str(tmp_path / "recipe.yaml")]) == 1
    error = capsys.readouterr().err
    assert "error: '3.png' has changed since" in error
    assert "Traceback" not in error


def test_random_crops_need_the_live_teacher(recipe_of):
    objective = get_objective("rs4d_distill")(recipe_of(crop_scale=[0.3, 0.5]))
    assert not torch.equal(read(objective).batch["pixel_values"], read(objective, epoch=1).batch["pixel_values"])
    with pytest.raises(ConfigurationError, match="no cached maps"):
        get_objective("rs4d_distill")(recipe_of(crop_scale=[0.3, 0.5], teacher_cache="anywhere"))


def test_a_teacher_with_other_statistics_sees_its_own_values(recipe_of, tmp_path):
    other = save_sam(tmp_path / "other", image_mean=[0.1, 0.2, 0.3])
    objective = get_objective("rs4d_distill")(recipe_of(teacher=str(other)))
    batch = read(objective).batch
    assert not torch.allclose(batch["teacher_pixel_values"], batch["pixel_values"])
    same = get_objective("rs4d_distill")(recipe_of())
    assert "teacher_pixel_values" not in read(same).batch
    seen = []
    objective.teacher = lambda values: seen.append(values) or torch.zeros(6, CHANNELS, 4, 4)
    objective.loss(objective.build_model(), batch, 0)
    assert torch.equal(seen[0], batch["teacher_pixel_values"])


def test_a_wider_teacher_gets_a_projector_that_is_not_exported(recipe_of, tmp_path):
    changes = {"model": {**STUDENT, "hidden_size": 16}, "max_steps": 2}
    recipe = recipe_of(changes, teacher=str(save_sam2(tmp_path / "sam2", whole=True)))
    student = AutoModel.from_pretrained(train(recipe))
    assert (student.config.hidden_size, student.config.teacher_channels) == (16, None)
    kept = RS4DForDistillation.from_pretrained(Path(recipe.output_dir) / "checkpoint-2")
    assert kept.projector.out_channels == CHANNELS
    train(recipe_of({**changes, "max_steps": 3}, teacher=str(tmp_path / "sam2")), resume=True)


def test_a_student_may_start_from_an_earlier_one(recipe_of, tmp_path):
    hub = train(recipe_of({"max_steps": 2}))
    recipe = recipe_of({"model": {"pretrained": str(hub)}, "output_dir": str(tmp_path / "next")})
    model = get_objective("rs4d_distill")(recipe).build_model()
    first = load_file(hub / "model.safetensors")
    assert all(torch.equal(value, model.rs4d.state_dict()[name]) for name, value in first.items())


def test_a_process_without_data_takes_part_without_the_teacher(recipe_of):
    objective = get_objective("rs4d_distill")(recipe_of(teacher_dtype="bfloat16"))
    objective.loss(objective.build_model(), objective.stand_in("optical"), 0)["l1"][0].sum().backward()
    assert objective.teacher._encoder is None


def test_the_card_says_what_is_ours_and_names_no_folder_of_this_machine(recipe_of, teacher, tmp_path):
    recipe = recipe_of({"max_steps": 2}, teacher_cache=str(tmp_path / "cache"))
    cache_for_recipe(recipe)
    card = (train(recipe) / "README.md").read_text()
    assert "this package's choice" in card
    assert "SHA-256" in card
    assert str(teacher.parent) not in card
    assert str(tmp_path) not in card


def test_the_picture_shows_what_the_student_sees_and_makes_of_it(recipe_of):
    recipe = recipe_of({"max_steps": 1, "picture_steps": 1})
    objective = get_objective("rs4d_distill")(recipe)
    columns = objective.picture(objective.build_model().eval(), read(objective).batch)
    assert [tuple(column.shape) for column in columns] == [(6, 3, SIZE, SIZE)] * 4
    assert (columns[1] != columns[0]).float().mean() > 0.9  # noise everywhere
    train(recipe)
    assert (Path(recipe.output_dir) / "pictures" / "step-0000001.png").is_file()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"teacher_cahe": "x"}, "did you mean 'teacher_cache'"),
        ({}, {"mask_ratio": 1.0}, "mask_ratio"),
        ({}, {"mask_ratio": 0.7, "schedule": "linear"}, "highest strength"),
        ({}, {"noise_ratio": -1}, "noise_ratio"),
        ({}, {"crop_scale": [0.5]}, "crop_scale"),
        ({}, {"crop_scale": [0.8, 0.5]}, "crop_scale"),
        ({}, {"teacher_dtype": "int8"}, "teacher_dtype"),
        ({}, {"schedule": "cosine"}, "schedule"),
        ({"image_size": 128}, {}, "set image_size to 64"),
        ({"model": {**STUDENT, "num_channels": 1}}, {}, "RGB"),
        ({"model": {**STUDENT, "out_type": "avg_featmap"}}, {}, "avg_featmap"),
        ({"model": {**STUDENT, "patch_size": 8}}, {}, "stride of 16"),
        ({"model": {**STUDENT, "model_type": "vheat"}}, {}, "model_type"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(recipe_of, changes, options, message):
    with pytest.raises(ConfigurationError, match=message):
        get_objective("rs4d_distill")(recipe_of(changes, **options))


def test_only_a_recipe_with_a_cache_can_be_cached(recipe_of, make_recipe):
    with pytest.raises(ConfigurationError, match="teacher_cache"):
        cache_for_recipe(recipe_of())
    with pytest.raises(ConfigurationError, match="rs4d_distill"):
        cache_for_recipe(make_recipe())
