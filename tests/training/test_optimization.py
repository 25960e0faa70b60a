import math

import pytest
import torch
from transformers import PreTrainedModel

from hf_rsheat.models.configuration_rs_vheat import RSVHeatConfig
from hf_rsheat.models.modeling_rs_vheat import RSVHeatForPreTraining
from hf_rsheat.training.optimization import build_optimizer, learning_rate

from .conftest import TINY_MODEL


def test_tables_decay_but_biases_norms_and_layer_scales_do_not(make_recipe):
    config = RSVHeatConfig(**{**TINY_MODEL, "layer_scale_init_value": 1e-5})
    model: PreTrainedModel = RSVHeatForPreTraining(config)
    optimizer = build_optimizer(model, make_recipe(weight_decay=0.08), torch.device("cpu"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert len(by_name) == len(decays)
    for name, decay in by_name.items():
        spared = name.endswith(".bias") or "norm" in name or "layer_scale" in name
        assert decay == (0.0 if spared else 0.08), name
    assert sum("frequency_embedding" in name or "heat_capacity" in name for name in by_name) == 8


def test_the_moments_are_those_of_the_recipe(make_recipe):
    model: PreTrainedModel = RSVHeatForPreTraining(RSVHeatConfig(**TINY_MODEL))
    given = make_recipe(adam_betas=(0.9, 0.95), adam_epsilon=1e-6)
    for recipe, betas, epsilon in ((make_recipe(), (0.9, 0.999), 1e-8), (given, (0.9, 0.95), 1e-6)):
        for group in build_optimizer(model, recipe, torch.device("cpu")).param_groups:
            assert (group["betas"], group["eps"]) == (betas, epsilon)


def test_the_learning_rate_warms_up_linearly_and_ends_at_the_minimum(make_recipe):
    recipe = make_recipe(max_steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert [learning_rate(step, recipe) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert learning_rate(10, recipe) == 1.0
    assert learning_rate(60, recipe) == pytest.approx(0.55)
    assert learning_rate(110, recipe) == pytest.approx(0.1)
    assert learning_rate(35, recipe) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
