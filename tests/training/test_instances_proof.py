"""A small detector learns to find generated ships and buildings (examples/rs4d_generated.yaml)."""

import time
from pathlib import Path

import pytest
import torch

from hf_rsheat.evaluation.instances import evaluate_instances
from hf_rsheat.instance_scenes import write_instance_scenes
from hf_rsheat.training.loop import train
from hf_rsheat.training.recipe import load_recipe

from .conftest import BACKBONE, DETECTOR, read_log

RECIPE = Path(__file__).parents[2] / "examples" / "rs4d_generated.yaml"
PROMPT = [
    "model.head=prompt",
    "model.with_box_pe=true",
    "model.mask_dice_weight=1.0",
    "model.mask_decoder_config={hidden_size: 128, num_attention_heads: 4, mlp_dim: 256, iou_head_hidden_dim: 64}",
    "max_steps=1500",
    "save_steps=750",
]


TINY_PROMPT = {
    "head": "prompt",
    "with_box_pe": True,
    "mask_dice_weight": 1.0,
    "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16},
}


@pytest.mark.parametrize(("head", "term"), [({}, "loss"), (TINY_PROMPT, "loss_mask")], ids=["bbox", "prompt"])
def test_the_loss_of_two_images_falls_in_a_few_steps(make_instances, head, term):
    """The quick version of the proof below: all five terms together, with every part of the model trained."""
    recipe = make_instances(
        model={"backbone_config": BACKBONE, **DETECTOR, **head},
        max_steps=40,
        save_steps=40,
        learning_rate=3e-3,
        options={"scale_range": [1.0, 1.0], "flip": 0.0},
    )
    train(recipe)
    losses = [line[term] for line in read_log(recipe.output_dir)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("head", "overrides", "ap50", "ap"), [("bbox", [], 0.95, 0.60), ("prompt", PROMPT, 0.85, 0.0)])
def test_a_small_detector_finds_what_it_never_saw(tmp_path, head, overrides, ap50, ap):
    torch.set_num_threads(2)
    scenes = write_instance_scenes(tmp_path / "scenes")
    run = tmp_path / head
    started, worked = time.perf_counter(), time.process_time()
    hub = train(load_recipe(RECIPE, [*overrides, f"image_folder={scenes}", f"output_dir={run}"]))
    minutes, cpu_minutes = (time.perf_counter() - started) / 60, (time.process_time() - worked) / 60
    result = evaluate_instances(hub, scenes / "annotations" / "test.json", scenes / "test")
    scores = {name: round(entry["value"], 3) for name, entry in result["metrics"].items()}
    print(f"\n{head}: {minutes:.1f} minutes, {cpu_minutes:.1f} of a core, {scores}")
    assert scores["mask_ap50"] >= ap50
    assert scores["mask_ap"] >= ap
