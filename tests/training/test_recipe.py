import re
from pathlib import Path

import pytest

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.training.recipe import Recipe, load_recipe, parse_yaml

REQUIRED = ["objective=rs_vheat", "image_folder=images", "output_dir=run"]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_overrides_are_yaml_and_reach_into_dictionaries():
    recipe = load_recipe(None, [*REQUIRED, "learning_rate=1e-4", "model.depths=[1,1,2,1]", "mixed_precision=no"])
    assert recipe.learning_rate == 1e-4
    assert recipe.model == {"depths": [1, 1, 2, 1]}
    assert recipe.mixed_precision == "no"


def test_overrides_win_over_the_file_and_leave_its_other_entries(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: rs_vheat\nimage_folder: a\noutput_dir: b\nmodel:\n  mlp_ratio: 2\nbatch_size: 8\n")
    recipe = load_recipe(path, ["batch_size=16", "model.drop_path_rate=0"])
    assert (recipe.batch_size, recipe.image_folder) == (16, "a")
    assert recipe.model == {"mlp_ratio": 2, "drop_path_rate": 0}


def test_model_may_be_a_folder_a_dictionary_or_both():
    assert load_recipe(None, [*REQUIRED, "model=some/folder"]).pretrained == "some/folder"
    both = load_recipe(None, [*REQUIRED, "model=some/folder", "model.drop_path_rate=0.2"])
    assert both.pretrained == "some/folder"
    assert both.model_fields == {"drop_path_rate": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batchsize=3", "Unknown recipe key 'batchsize': did you mean 'batch_size'"),
        ("batch_size=three", "batch_size"),
        ("batch_size=true", "batch_size"),
        ("batch_size=0", "'batch_size' must be at least 1"),
        ("image_size=16", "'image_size' must be at least 32"),
        ("learning_rate=-1", "learning_rate"),
        ("learning_rate=.nan", "learning_rate"),
        ("mixed_precision=fp8", "mixed_precision"),
        ("warmup_steps=1000", "'warmup_steps'"),
        ("min_learning_rate=1", "'min_learning_rate'"),
        ("adam_betas=[0.9,1.0]", "'adam_betas' must lie in [0, 1)"),
        ("adam_betas=0.9", "adam_betas"),
        ("prune_ratio=1.0", "'prune_ratio' must be below 1"),
        ("prune_until=1.5", "'prune_until' must be at most 1"),
        ("preprocessing.sar=3", "preprocessing"),
        ("seed.x=3", "'seed.x' cannot be set"),
        ("ema_decay=1.0", "'ema_decay' must lie in [0, 1)"),
        ("trackers=[tensorbord]", "'trackers' may name tensorboard, trackio, wandb"),
        ("keep_every=0", "'keep_every' must be at least 1"),
        ("batch_size", "not an override"),
        ("model=[1", "Not valid YAML"),
    ],
)
def test_a_wrong_entry_is_named(override, message):
    overrides = [*REQUIRED, "seed=1", override]
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load_recipe(None, overrides)


def test_missing_required_keys_are_named():
    with pytest.raises(ConfigurationError, match="image_folder, output_dir must be set"):
        load_recipe(None, ["objective=rs_vheat"])


def test_a_missing_file_and_a_repeated_key_are_errors(tmp_path):
    with pytest.raises(ConfigurationError, match="Cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match="batch_size more than once"):
        parse_yaml("batch_size: 1\nbatch_size: 2\n")


def test_a_saved_recipe_reads_back_equal(tmp_path, make_recipe):
    recipe = make_recipe(model={"pretrained": "folder", "layer_scale_init_value": None}, learning_rate=1e-5)
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_valid_recipe(path):
    assert isinstance(load_recipe(path), Recipe)
