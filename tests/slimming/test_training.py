"""Slimmable training: narrow widths are the exported function, and train the full weights."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_rsheat.errors import ConfigurationError
from hf_rsheat.slimming import slim
from hf_rsheat.slimming.shells import MAX_SHELLS, Shells
from hf_rsheat.training.data import BatchReader, load_batches
from hf_rsheat.training.loop import train
from hf_rsheat.training.objectives import get_objective
from hf_rsheat.training.sampler import GlobalBatchSampler
from tests.training.conftest import (  # noqa: F401
    _one_thread_fresh_accelerator,
    make_recipe,
    read_log,
    scenes,
)

from .models import OURS, VIT, build, images, outputs

VIT_FIELDS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
DECODER = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
MODELS = {
    "mae": {**VIT_FIELDS, **DECODER, "intermediate_size": 32, "decoder_intermediate_size": 24},
    "selective_mae": {**VIT_FIELDS, **DECODER},
    "rs_vheat": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "layer_scale_init_value": None},
    "moco": {"model_type": "vheat", "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
}
INNER = {"moco": {"queue_size": 16, "head_size": 16, "key_size": 8}}


@pytest.fixture
def recipe(make_recipe, scenes):  # noqa: F811
    def build_recipe(objective: str, **changes):
        options = {"objective": objective, "objective_options": INNER.get(objective, {}), "widths_per_step": 3}
        folder = scenes if objective == "rs_vheat" else scenes / "optical"
        options |= changes.pop("options", {})
        return make_recipe(
            objective="slimmable",
            objective_options=options,
            model=dict(MODELS[objective]),
            image_folder=str(folder),
            **changes,
        )

    return build_recipe


def first_batch(objective, recipe):
    """The first batch of a run."""
    reader = BatchReader(Path(recipe.image_folder), objective.samples, objective, recipe.seed)
    sampler = GlobalBatchSampler([s.group for s in objective.samples], recipe.batch_size, recipe.seed)
    return next(load_batches(reader, sampler.plans(0, 1, 0, 1, 1), 0, pin_memory=False)).batch


@pytest.mark.parametrize("width", [1.0, 0.7, 0.5, 0.01])
@pytest.mark.parametrize("name", OURS)
def test_in_training_a_narrow_width_is_bit_for_bit_the_exported_model(name, width):
    model = build(name)
    pixel_values = images(model)
    exported = outputs(slim(model, width), pixel_values)
    narrow = Shells(model).at(width)
    for mine, theirs in zip(outputs(narrow, pixel_values), exported, strict=True):
        assert torch.equal(mine, theirs)


def test_the_narrow_encoder_of_a_masked_autoencoder_is_the_exported_one_under_a_whole_decoder():
    fields = {"decoder_hidden_size": 12, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
    model = ViTMAEForPreTraining(ViTMAEConfig(**VIT, **fields, intermediate_size=48)).eval()
    pixel_values, noise = images(model), torch.rand(2, 16)
    narrow = Shells(model).at(0.5)
    seen = []
    hook = narrow.shell.vit.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        logits = narrow(pixel_values, noise=noise).logits
        expected = slim(model.vit, 0.5)(pixel_values, noise=noise).last_hidden_state
    hook.remove()
    assert torch.equal(seen[0], expected)
    assert logits.shape == (2, 16, 3 * 8**2)


@pytest.mark.parametrize("name", ["selective-mae", "vheat", "rs-vheat", "rs4d"])
def test_a_narrow_pass_trains_the_kept_units_and_no_other(name):
    model = build(name)
    shells = Shells(model)
    shells.at(0.5)(images(model)).pooler_output.square().sum().backward()
    index = shells.at(0.5)._index
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in index:
            continue
        axis, kept = index[parameter_name]
        dropped = torch.ones(parameter.shape[axis], dtype=torch.bool)
        dropped[kept] = False
        gradient = parameter.grad.movedim(axis, 0)
        assert not gradient[dropped].any()
    assert sum(float(p.grad.abs().sum()) for n, p in model.named_parameters() if n in index) > 0


def test_shells_are_built_once_and_not_kept_without_end():
    shells = Shells(build("selective-mae"))
    assert shells.at(0.5) is shells.at(0.5)
    for index in range(1, 200):
        shells.at(index / 200)
    assert len(shells._shells) <= MAX_SHELLS


def test_building_a_shell_draws_nothing():
    model = build("selective-mae-pretraining")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Shells(model).at(0.3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("objective", MODELS)
def test_it_trains_and_exports_the_full_width(objective, recipe):
    run = recipe(objective)
    hub = train(run)
    assert (hub / "model.safetensors").is_file()
    log = read_log(run.output_dir)
    assert len(log) == run.max_steps
    assert all(line["loss"] is not None for line in log)
    narrow = [name for name in log[0] if name.startswith("narrow_")]
    assert narrow
    assert ("distillation" in log[0]) is (objective != "moco")


@pytest.mark.parametrize("objective", ["selective_mae", "moco"])
def test_a_resumed_run_ends_bit_for_bit_the_same(objective, recipe, tmp_path):
    whole = recipe(objective, output_dir=str(tmp_path / "whole"))
    expected = load_file(train(whole) / "model.safetensors")
    half = recipe(objective, output_dir=str(tmp_path / "half"))
    train(half)
    shutil.rmtree(tmp_path / "half" / "hub")
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    found = load_file(train(half, resume=True) / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_widths_of_a_step_follow_from_seed_and_step(recipe):
    objective = get_objective("slimmable")(recipe("selective_mae", options={"widths_per_step": 5, "min_width": 0.05}))
    widths = objective.widths(7)
    assert len(widths) == 4
    assert widths[0] == 0.05
    assert all(0.05 <= width <= 1 for width in widths)
    assert widths == objective.widths(7) != objective.widths(8)


def test_all_narrow_widths_together_weigh_as_much_as_the_full_one(recipe):
    objective = get_objective("slimmable")(recipe("selective_mae", options={"widths_per_step": 5}))
    weights = objective.term_weights
    assert weights["reconstruction"] == 1
    assert weights["narrow_reconstruction"] + weights["distillation"] == pytest.approx(1)


def test_counts_known_in_advance_are_those_of_the_loss(recipe):
    run = recipe("selective_mae")
    objective = get_objective("slimmable")(run)
    batch = first_batch(objective, run)
    terms = objective.loss(objective.build_model().train(), batch, 0)
    assert {name: count for name, (_, count) in terms.items()} == objective.counts(batch)


def test_the_momentum_encoder_moves_once_per_step(recipe):
    run = recipe("moco")
    objective = get_objective("slimmable")(run)
    model = objective.build_model().train()
    calls = {"follow": 0, "enqueue": 0}
    for name in calls:
        original = getattr(model, name)

        def counted(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        object.__setattr__(model, name, counted)
    objective.loss(model, first_batch(objective, run), 0)
    assert calls == {"follow": 1, "enqueue": 1}


def test_bfloat16_holds_for_narrow_widths_too(recipe):
    run = recipe("selective_mae", mixed_precision="bf16", max_steps=2, save_steps=2, warmup_steps=0)
    train(run)
    assert all(line["loss"] is not None for line in read_log(run.output_dir))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "classification"},
        {"objective": "mae", "widths_per_step": 1},
        {"objective": "mae", "min_width": 0.0},
        {"objective": "mae", "sub_loss_weight": 0.0},
        {"objective": "mae", "distillation": 1.5},
        {"objective": "moco", "distillation": 0.5},
    ],
)
def test_options_that_make_no_sense_are_refused(options, recipe):
    run = recipe("mae")
    values = asdict(run)
    values["objective_options"] = options
    with pytest.raises(ConfigurationError):
        get_objective("slimmable")(type(run)(**values))


@pytest.mark.slow
def test_two_processes_train_narrow_widths_like_one(recipe, tmp_path):
    one = recipe("selective_mae", batch_size=4, max_steps=3, save_steps=3, warmup_steps=0)
    train(one)
    two = recipe(
        "selective_mae", batch_size=4, max_steps=3, save_steps=3, warmup_steps=0, output_dir=str(tmp_path / "2")
    )
    two.save(tmp_path / "two.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "hf_rsheat.train", "--config", str(tmp_path / "two.yaml")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 process(es)" in result.stderr
    for before, after in zip(read_log(one.output_dir), read_log(two.output_dir), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)
