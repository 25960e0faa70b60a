"""Students learn what a teacher makes of images they have not seen; docs/distillation.md has the same on real ones."""

from pathlib import Path

import pytest
import torch
from transformers import SamImageProcessor, SamVisionConfig, SamVisionModel

from hf_rsheat.evaluation.distillation import evaluate_distillation, report
from hf_rsheat.scenes import write_labelled_scenes
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives.rs4d_distill import cache_for_recipe
from hf_rsheat.training.recipe import load_recipe
from hf_rsheat.training.teacher import Teacher

RECIPE = Path(__file__).parents[2] / "examples" / "rs4d_distill_small.yaml"


def save_small_sam(folder: Path) -> Path:
    """The teacher of docs/distillation.md: random weights, maps of 32 channels for images of 64 px."""
    torch.manual_seed(0)
    config = SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        window_size=2,
        global_attn_indexes=[1, 3],
        initializer_range=0.02,
    )
    SamVisionModel(config).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamImageProcessor(**sizes).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_student_beats_the_mean_map_on_scenes_it_has_not_seen(tmp_path):
    teacher = save_small_sam(tmp_path / "teacher")
    train_images = write_labelled_scenes(tmp_path / "train", 180, size=64, seed=0)
    held_out = write_labelled_scenes(tmp_path / "held_out", 60, size=64, seed=1)
    options = {"teacher": teacher, "teacher_cache": tmp_path / "cache", "schedule": "adaptive"}
    overrides = [f"objective_options.{name}={value}" for name, value in options.items()]
    places = [f"image_folder={train_images}", f"output_dir={tmp_path / 'run'}"]
    recipe = load_recipe(RECIPE, [*places, *overrides, "max_steps=600"])
    cache_for_recipe(recipe)
    result = evaluate_distillation([train(recipe)], Teacher(teacher), held_out, train_images)
    print(report(result))
    assert result["students"][0]["ratio"] < 0.7
    assert result["students"][0]["interval95"][1] < 0.75
