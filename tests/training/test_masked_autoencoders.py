"""SelectiveMAE and its baseline MAE train in the one loop, and their results depend on nothing but the recipe."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTMAEForPreTraining,
)

from hf_rsheat import SelectiveMAEForImageClassification, SelectiveMAEForPreTraining, SelectiveMAEModel
from hf_rsheat.errors import ConfigurationError
from hf_rsheat.hub import load_folder
from hf_rsheat.models.selective_mae_layers import sincos_table
from hf_rsheat.training.data import BatchReader
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.objectives.mae import encoder_of
from hf_rsheat.training.recipe import load_recipe
from hf_rsheat.training.sampler import BatchPlan

from .conftest import read_log

SELECTIVE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "decoder_hidden_size": 12,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "norm_pix_loss": False,
}
MAE = {**SELECTIVE, "intermediate_size": 64, "decoder_intermediate_size": 48, "layer_norm_eps": 1e-6}
MODELS = {"selective_mae": SELECTIVE, "mae": MAE}
BOTH = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Bright images of noise: there is one thing to learn, and it is quick to learn."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(8):
        level = np.random.default_rng(index).integers(200, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(level).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def recipe_of(make_recipe, pictures):
    def build(name: str, **changes):
        model = dict(MODELS[name])
        fields = {"image_folder": str(pictures), "image_size": 64, "model": model, "warmup_steps": 0, **changes}
        return make_recipe(objective=name, **fields)

    return build


def read(objective, epoch=0):
    plan = BatchPlan(0, epoch, 0, 1, "optical", tuple(range(len(objective.samples))))
    return BatchReader(Path(objective.recipe.image_folder), objective.samples, objective, objective.recipe.seed)[
        plan
    ].batch


@BOTH
def test_the_loss_falls_and_the_folder_is_usable(recipe_of, name, tmp_path):
    recipe = recipe_of(name, max_steps=60, save_steps=60, learning_rate=3e-3, batch_size=8)
    hub = train(recipe)
    losses = [entry["loss"] for entry in read_log(recipe.output_dir)]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    encoder = AutoModel.from_pretrained(hub)
    assert type(encoder) is SelectiveMAEModel
    assert encoder(torch.randn(1, 3, 64, 64)).pooler_output.shape == (1, 16)
    model, _ = load_folder(hub)
    assert type(model) is (SelectiveMAEForPreTraining if name == "selective_mae" else SelectiveMAEModel)
    stored = AutoModelForPreTraining.from_pretrained(tmp_path / "run" / "checkpoint-60")
    assert type(stored) is (SelectiveMAEForPreTraining if name == "selective_mae" else ViTMAEForPreTraining)


@BOTH
def test_accumulation_and_resuming_change_nothing(recipe_of, name, tmp_path):
    whole = train(recipe_of(name, output_dir=str(tmp_path / "whole"), max_steps=4, save_steps=2))
    parts = train(
        recipe_of(name, output_dir=str(tmp_path / "parts"), max_steps=4, save_steps=2, gradient_accumulation_steps=2)
    )
    expected, actual = (load_file(hub / "model.safetensors") for hub in (whole, parts))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-4, rtol=1e-3)
    resumed = train(
        recipe_of(name, output_dir=str(tmp_path / "whole"), max_steps=4, save_steps=2),
        resume=_only_first_checkpoint(tmp_path / "whole"),
    )
    again = load_file(resumed / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in expected.items())


def _only_first_checkpoint(run):
    shutil.rmtree(run / "checkpoint-4")
    return run / "checkpoint-2"


@BOTH
def test_counts_agree_with_the_loss(recipe_of, name):
    objective = get_objective(name)(recipe_of(name))
    batch = read(objective)
    model = objective.build_model().train()
    terms = objective.loss(model, batch, 0)
    assert {term: count for term, (_, count) in terms.items()} == objective.counts(batch) == {"reconstruction": 8}
    losses = terms["reconstruction"][0]
    assert losses.shape == (8,)
    assert losses.mean().item() == pytest.approx(_mean_loss(model, batch, name), rel=1e-5)
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _mean_loss(model, batch, name):
    return model(**batch, progress=0.0).loss.item() if name == "selective_mae" else model(**batch).loss.item()


@BOTH
def test_draws_depend_on_seed_epoch_and_sample_only(recipe_of, name):
    objective = get_objective(name)(recipe_of(name))
    drawn = "seed_ids" if name == "selective_mae" else "noise"
    first, again, later = (read(objective, epoch)[drawn] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


@BOTH
def test_the_picture_has_the_input_what_is_encoded_and_what_is_made_of_it(recipe_of, name):
    recipe = recipe_of(name, max_steps=2, save_steps=2, picture_steps=2)
    train(recipe)
    with Image.open(Path(recipe.output_dir) / "pictures" / "step-0000002.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (4 * 64 + 3 * 4, 3 * 64 + 2 * 4, 3)
    original, encoded = pixels[:64, :64], pixels[:64, 68:132]
    same = (abs(original - encoded) <= 1).all(-1).mean()
    assert same == pytest.approx(16 / 64 if name == "mae" else 9 / 64, abs=0.03)


@pytest.mark.parametrize("criterion", ["uniform", "hog"])
def test_every_step_of_the_schedule_trains(recipe_of, criterion):
    recipe = recipe_of("selective_mae", max_steps=40, model={**SELECTIVE, "criterion": criterion})
    objective = get_objective("selective_mae")(recipe)
    batch = read(objective)
    assert ("seed_ids" in batch) == (criterion == "uniform")
    model = objective.build_model().train()
    state = torch.get_rng_state()
    for step in (0, 14, 15, 28, 29, 30, 39):
        first, second = (objective.loss(model, batch, step)["reconstruction"][0] for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn besides the sample and the step


def test_a_new_mae_knows_where_its_patches_are(recipe_of):
    objective = get_objective("mae")(recipe_of("mae"))
    model = objective.build_model()
    tables = (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed)
    for table in tables:
        assert torch.equal(table[:, 1:], sincos_table(8, 8, table.shape[-1]))
        assert not table.requires_grad
    assert model.decoder.mask_token.abs().sum() > 0


def test_a_new_mae_has_the_weights_of_the_paper_and_a_loaded_one_its_own(recipe_of, tmp_path):
    for name, module in get_objective("mae")(recipe_of("mae")).build_model().named_modules():
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            limit = (6 / (rows + columns)) ** 0.5
            assert 0.9 * limit < module.weight.abs().max() <= limit, name
    train(recipe_of("mae", max_steps=1, save_steps=1))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    again = get_objective("mae")(recipe_of("mae"), checkpoint).build_model().state_dict()
    assert all(torch.equal(value, again[key]) for key, value in load_file(checkpoint / "model.safetensors").items())


def test_the_exported_mae_encoder_computes_what_it_did_in_training(recipe_of):
    model = get_objective("mae")(recipe_of("mae")).build_model().eval()
    encoder = encoder_of(model)
    pixel_values = torch.randn(2, 3, 64, 64)
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = model.vit(pixel_values, noise=torch.arange(64.0).expand(2, -1)).last_hidden_state
        torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_starts_from_a_pretrained_folder(recipe_of, make_recipe, classes, tmp_path):
    hub = train(recipe_of("selective_mae", max_steps=1, save_steps=1))
    tuning = {"image_folder": str(classes), "output_dir": str(tmp_path / "tuned"), "objective": "classification"}
    fields = {"pretrained": str(hub), "drop_path_rate": 0.1}
    tuned = train(make_recipe(**tuning, image_size=64, model=fields, max_steps=2, warmup_steps=0))
    model = AutoModelForImageClassification.from_pretrained(tuned)
    assert type(model) is SelectiveMAEForImageClassification
    assert model.config.id2label == {0: "bright", 1: "dark"}
    assert model.config.drop_path_rate == 0.1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("selective_mae", {"model": {"depth": 3}}, "Unknown model field"),
        ("selective_mae", {"model": {**SELECTIVE, "model_type": "vheat"}}, "remove"),
        ("selective_mae", {"model": {**SELECTIVE, "mask_ratio": 0.3, "kept_mask_ratio": 0.9}}, "too few"),
        ("selective_mae", {"model": {**SELECTIVE, "num_channels": 10}}, "10 statistics"),
        ("mae", {"model": {**MAE, "model_type": "vit"}}, "remove"),
        ("mae", {"image_size": 60}, "multiple of the patch"),
    ],
)
def test_wrong_entries_are_refused_before_any_work(recipe_of, name, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        get_objective(name)(recipe_of(name, **changes))


@pytest.mark.parametrize("name", ["selective_mae_base", "mae_base"])
def test_the_published_recipes_are_valid(name, pictures):
    path = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    objective = get_objective(load_recipe(path).objective)(load_recipe(path, [f"image_folder={pictures}"]))
    assert objective.config.hidden_size == 768
    assert json.loads(objective.config.to_json_string())["norm_pix_loss"] is True
