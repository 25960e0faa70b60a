import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hf_rsheat.training.memory import (
    HEADROOM,
    RESERVED,
    MemoryModel,
    PeakMemory,
    activation_peak,
    measure,
    plan,
)
from hf_rsheat.training.objectives import get_objective

from .conftest import TINY_MODEL


def test_the_counter_sees_peaks_frees_and_views_once():
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        view = first[:10]
        assert memory.live == 4000
        second = first + 1
        assert memory.live == 8000
        del second
        del first, view
        assert memory.live == 0
    assert memory.peak == 8000


def test_activations_grow_linearly_with_the_batch(make_recipe):
    """Two small batches foretell a larger one, which is what the plan rests on."""
    recipe = make_recipe(image_size=64)
    model = measure(recipe, (2, 4))
    objective = get_objective(recipe.objective)(recipe, None)
    found = activation_peak(recipe, objective, objective.build_model().train(), 12)
    assert model.constant + 12 * model.per_image == pytest.approx(found, rel=0.03)


def test_recomputing_and_half_precision_save_memory(make_recipe):
    plain = measure(make_recipe(image_size=64))
    assert measure(make_recipe(image_size=64, mixed_precision="bf16")).per_image < 0.9 * plain.per_image
    deep = {**TINY_MODEL, "depths": [4, 4, 4, 4]}
    kept = measure(make_recipe(image_size=64, model=deep))
    recomputed = measure(make_recipe(image_size=64, model=deep, gradient_checkpointing=True))
    assert recomputed.per_image < 0.6 * kept.per_image


def test_state_per_gpu():
    model = MemoryModel(1000, 800, False, constant=0, per_image=1, largest_group=100)
    assert model.state == 4 * 1000 + 4 * 800 + 8 * 800
    assert replace(model, averaged=True).state == model.state + 4 * 800
    assert replace(model, gpus=4).state == model.state + 4 * 800  # DDP's buckets
    assert replace(model, gpus=4, sharded=True).state == model.state / 4 + 2 * 4 * 100


def test_the_largest_batch_fits_and_one_more_does_not():
    model = MemoryModel(1000, 1000, False, constant=5e8, per_image=3e7, largest_group=0)
    batch = model.largest_batch(8e9)
    assert model.total(batch) <= (8e9 - RESERVED) * HEADROOM < model.total(batch + 1)
    assert model.largest_batch(1e9) == 0


def test_the_plan_says_whether_it_fits_and_what_to_do(make_recipe):
    fits = plan(make_recipe(), 8, 80, sharded=False)
    assert "1 images of 4" in fits
    assert "fits" in fits
    assert "advice" not in fits
    assert "gradient_accumulation_steps=" in plan(make_recipe(batch_size=10_000_000), 8, 80, sharded=True)
    assert "not even one image fits" in plan(make_recipe(), 1, 0.5, sharded=False)


STEP = """
import resource, sys, torch
from hf_rsheat.training.memory import activation_peak
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.optimization import build_optimizer
from hf_rsheat.training.recipe import load_recipe
torch.set_num_threads(1)
recipe = load_recipe(sys.argv[1])
objective = get_objective(recipe.objective)(recipe, None)
activation_peak(recipe, objective, objective.build_model().train(), 1)  # first uses of every kernel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = objective.build_model().train()
optimizer = build_optimizer(model, recipe, torch.device("cpu"))
activation_peak(recipe, objective, model, int(sys.argv[2]))
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
activation_peak(recipe, objective, model, int(sys.argv[2]))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("size", [128, 224])
def test_the_plan_agrees_with_the_memory_a_process_really_takes(make_recipe, tmp_path, size):
    """Resident memory of a fresh process with 16 images, against the model; at two sizes."""
    model = {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 4, 2], "layer_scale_init_value": None}
    recipe = make_recipe(model=model, image_size=size)
    recipe.save(tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", STEP, str(tmp_path / "recipe.yaml"), "16"]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    expected = measure(recipe).total(16)
    print(f"\n{size} px: {measured / 1e9:.3f} GB measured, {expected / 1e9:.3f} GB planned")
    assert measured == pytest.approx(expected, rel=0.15)
